"""Overlays of drives: ``overlay`` in PUT /drives/{drive_id}, an addition of ours (docs/overlays.md)."""

from __future__ import annotations

import os

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_input, open_kept
from vmm.json.schema import STRING, Field, Object

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class OverlayConfigError(VmmError):
    """A drive cannot have this overlay; the text names the file."""

    code = "vmm.overlay"


class OverlayConfig(NamedTuple):
    """``path`` of the overlay's file, which is made if it is not there; the drive's ``path_on_host`` is the base."""

    path: str

    def to_json(self) -> JsonValue:
        """Return what GET /vm/config shows."""
        return {"path": self.path}


OVERLAY = Object("OverlayConfig", OverlayConfig, Field("path", STRING))


class OverlayFiles(NamedTuple):
    """Two open files, locked, which are the caller's; ``size`` of the drive in bytes."""

    base: int
    overlay: int
    size: int

    def close(self) -> None:
        """Give both back, with their locks."""
        os.close(self.base)
        os.close(self.overlay)


def open_overlay_files(base_path: str, config: OverlayConfig, boot_id: bytes) -> OverlayFiles:
    """Open a drive's base for reading and its overlay for writing, and look whether they belong together.

    A base may be shared with others that read it, an overlay with nobody. A file that is empty, or was not there, is
    made an overlay by the cell that serves it. Raises OverlayConfigError.
    """
    try:
        base = open_input(base_path)
    except FileOpenError as error:
        raise OverlayConfigError(f"{error} {base_path}") from error
    try:
        overlay = open_kept(config.path)
    except FileOpenError as error:
        os.close(base)
        raise OverlayConfigError(f"{error} {config.path}") from error
    try:
        return OverlayFiles(base, overlay, _size(base, overlay, boot_id, (base_path, config.path)))
    except BaseException:
        os.close(base)
        os.close(overlay)
        raise


def _size(base: int, overlay: int, boot_id: bytes, names: tuple[str, str]) -> int:
    """Lock both, and return the size of the drive. Raises OverlayConfigError."""
    # Most machines have no overlay: what reads one is loaded for those that have.
    from virtio.block.overlay.file import OsErrors, check_base, check_unfinished, is_blank, read_overlay
    from virtio.block.overlay.storage import Storage, lock
    from virtio.errors import OverlayError

    base_name, name = names
    try:
        lock(base, f"the base {base_name}", shared=True)
        lock(overlay, f"the overlay {name}", shared=False)
    except OverlayError as error:
        raise OverlayConfigError(str(error)) from error
    disk, base_disk = Storage(overlay), Storage(base)
    try:
        with OsErrors("it cannot be read"):
            if is_blank(disk):
                return base_disk.size >> 9 << 9
            found = read_overlay(disk, boot_id)
            check_unfinished(found)
            check_base(found.state.base, base_disk)
            return found.geometry.size
    except OverlayError as error:
        raise OverlayConfigError(f"the overlay {name}: {error}") from error
