"""What there is to say about an overlay: for people, for programs, and what is wrong with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cellblock.overlay.progress import size_text
from virtio.block.overlay.file import UNFINISHED, Disk, OverlayFile, check_base
from virtio.block.overlay.layout import PHASE_NONE, PHASES
from virtio.errors import OverlayError

_PHASES = dict(zip(PHASES, ("none", "commit", "clear"), strict=True))
_NS = 1_000_000_000


def describe(overlay: OverlayFile, allocated: int, *, in_use: bool) -> dict[str, Any]:
    """Return the facts. ``allocated``: bytes that the file takes of its file system."""
    geometry, base = overlay.geometry, overlay.state.base
    size = 1 << geometry.cluster_bits
    return {
        "id": geometry.id.hex(),
        "size": geometry.size,
        "cluster_size": size,
        "clusters": geometry.clusters,
        "clusters_in_overlay": overlay.map.count,
        "clusters_not_flushed": overlay.map.pending_count,
        "allocated": allocated,
        "base_size": base.size,
        "base_mtime_ns": base.mtime_ns,
        "pending": _PHASES[overlay.state.phase],
        "in_use": in_use,
    }


def text(facts: dict[str, Any]) -> str:
    """Return the facts as lines."""
    mapped, size = facts["clusters_in_overlay"], facts["cluster_size"]
    share = f"{size_text(mapped * size)} ({100 * mapped / facts['clusters']:.3g} %)"
    lines = [
        ("drive", f"{size_text(facts['size'])} ({facts['size']} bytes), id {facts['id']}"),
        ("clusters", f"{facts['clusters']} of {size_text(size)}"),
        ("in the overlay", f"{mapped} clusters, {share}, {facts['clusters_not_flushed']} of them not flushed"),
        ("takes", size_text(facts["allocated"])),
        ("base", f"{facts['base_size']} bytes, of {time_text(facts['base_mtime_ns'])}"),
        ("pending", facts["pending"]),
        ("in use", "yes" if facts["in_use"] else "no"),
    ]
    return "\n".join(f"{name + ':':15} {value}" for name, value in lines)


def time_text(time_ns: int) -> str:
    """Return a time in UTC; what no calendar knows, as a number."""
    try:
        return datetime.fromtimestamp(time_ns // _NS, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"


def problems(overlay: OverlayFile, base: Disk | None) -> tuple[list[str], list[str]]:
    """Return what keeps an overlay from being used, and what is worth knowing. Raises OSError."""
    wrong, notes = [], []
    if overlay.state.phase != PHASE_NONE:
        wrong.append(UNFINISHED)
    elif base is not None:
        try:
            check_base(overlay.state.base, base)
        except OverlayError as error:
            wrong.append(str(error))
        else:
            if base.mtime_ns != overlay.state.base.mtime_ns:
                notes.append(
                    f"the base was written to, or copied, at {time_text(base.mtime_ns)}; the overlay was made over one "
                    f"of {time_text(overlay.state.base.mtime_ns)}. All samples of it are the same"
                )
    pending = overlay.map.pending_count
    if pending:
        notes.append(f"{pending} clusters are not flushed: a power loss would undo them")
    return wrong, notes
