"""Which engines serve a drive with an overlay: the API's ``io_engine``. Apart, for most drives have none."""

from __future__ import annotations

from base.errors import ThreadError
from virtio.block.backing_file import BackingFile
from virtio.block.engine import Engine
from virtio.block.engines import ASYNC, SYNC, make_async_engine
from virtio.block.file_engine import FileEngine
from virtio.block.overlay.backing import OverlayBacking
from virtio.block.overlay.engine import OverlayEngine


def make_overlay_engine(io_engine: str, base: BackingFile, overlay: OverlayBacking) -> Engine:
    """Return an engine for a base and its overlay, both of which it takes. Before the seal. Raises ThreadError."""
    if io_engine == SYNC:
        return OverlayEngine(FileEngine(base), FileEngine(overlay), overlay)
    assert io_engine == ASYNC
    upper = make_async_engine(overlay)
    try:
        return OverlayEngine(make_async_engine(base, upper.event), upper, overlay)
    except ThreadError:
        upper.close()
        raise
