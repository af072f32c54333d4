"""What a device of each kind is made of in its cell: settings, files, and what another cell has saved of it."""

from __future__ import annotations

import os

from base.lean_typing import Any, Callable, Sequence
from ipc.errors import MessageError
from ipc.messages.device import Attach
from ipc.schema import RecordOf, Section, pack, unpack
from virtio.abi import VIRTIO_ID_BLOCK, VIRTIO_ID_ENTROPY
from virtio.block.configuration import BLOCK_CONFIGURATION, BLOCK_SECTION
from virtio.block.maker import make_block
from virtio.block.overlay.maker import make_overlay_block
from virtio.device import VirtioDevice
from virtio.entropy import ENTROPY_SETTINGS, Entropy
from virtio.errors import SettingsError
from virtio.rate_limiter import RateLimiter

#: How many files a drive has.
_FILE, _BASE_AND_OVERLAY = 1, 2


def _entropy(message: Attach, files: list[int], boot_id: bytes) -> VirtioDevice:
    settings = record_of(ENTROPY_SETTINGS, message.settings, "settings")
    state = saved_state(Entropy.SECTION, message)
    return Entropy(message.id, RateLimiter(settings.bandwidth, settings.ops), state)


def _block(message: Attach, files: list[int], boot_id: bytes) -> VirtioDevice:
    try:
        configuration = record_of(BLOCK_CONFIGURATION, message.settings, "settings")
        state = saved_state(BLOCK_SECTION, message)
        if len(files) not in (_FILE, _BASE_AND_OVERLAY):
            raise SettingsError(f"a drive has one file, or a base and an overlay, not {len(files)}")
    except SettingsError:
        close(files)
        raise
    if len(files) == _BASE_AND_OVERLAY:
        return make_overlay_block(configuration, (files[0], files[1]), boot_id, state)
    return make_block(configuration, files[0], state)


#: VIRTIO_ID_* → what makes such a device of its message and its files, which it takes.
_MAKERS: dict[int, Callable[[Attach, list[int], bytes], VirtioDevice]] = {
    VIRTIO_ID_BLOCK: _block,
    VIRTIO_ID_ENTROPY: _entropy,
}


def make(message: Attach, files: list[int], boot_id: bytes) -> VirtioDevice:
    """Return the device; ``boot_id`` is the launch plan's.

    Raises VirtioError, ThreadError; then the files are closed.
    """
    maker = _MAKERS.get(message.device_type)
    if maker is None:
        close(files)
        raise SettingsError(f"no device of the kind {message.device_type} is known here")
    return maker(message, files, boot_id)


def close(files: Sequence[int]) -> None:
    """Close files that no device took."""
    for each in files:
        os.close(each)


def record_of(fields: RecordOf, packed: bytes, name: str) -> Any:
    """Return what was packed. Raises SettingsError."""
    try:
        return fields.check(unpack(packed), name)
    except MessageError as error:
        raise SettingsError(f"it cannot be read: {error}") from None


def saved_state(section: Section, message: Attach) -> Any:
    """Return the state that another cell has saved of the device, or None. Raises SettingsError."""
    return record_of(section.fields, message.state, "state") if message.state else None


def state_of(device: VirtioDevice) -> bytes:
    """Return what a device has to save, packed. Raises MessageError if it is out of its own bounds."""
    return pack(device.SECTION.fields.check(device.save(), device.SECTION.name))
