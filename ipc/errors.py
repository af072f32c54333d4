"""The exception tree of ``ipc``."""

from __future__ import annotations

from base.errors import CellblockError


class IpcError(CellblockError):
    """Base of every error that this package raises; ``code`` is stable, the text says what happened."""

    code = "ipc"


class MessageError(IpcError):
    """A frame or a message that breaks the schema: the peer is hostile, broken or of another version."""

    code = "ipc.message"


class ChannelError(IpcError):
    """The channel itself failed: the peer is gone, or a bound of the channel was reached."""

    code = "ipc.channel"


class DescriptorError(IpcError):
    """A descriptor message was malformed, truncated or came where none is accepted."""

    code = "ipc.descriptors"


class LayoutError(IpcError):
    """A shared-memory object does not have the layout that was agreed on."""

    code = "ipc.layout"


class RingError(IpcError):
    """The producer of an exit ring broke its rules (sequence, bounds); the ring is not used any more."""

    code = "ipc.ring"


class BlockedEventError(IpcError):
    """A write to an eventfd that another process shares had to wait: that process has made it so."""

    code = "ipc.event"


class GuestMemoryError(IpcError):
    """An access outside guest RAM, or guest memory that cannot be mapped. ``errno`` is 0 unless a call failed."""

    code = "memory"

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


class FilterFileError(IpcError):
    """A file of custom system call filters is damaged, or too large."""

    code = "ipc.filter_file"
