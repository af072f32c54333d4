"""The exception tree of ``virtio``."""

from __future__ import annotations

from base.errors import CellblockError


class VirtioError(CellblockError):
    """Base of every error that this package raises. A device that raises one while it serves needs a reset."""

    code = "virtio"


class QueueError(VirtioError):
    """The driver set a queue up wrongly, or broke the rules of its rings or chains."""

    code = "virtio.queue"


class RequestError(VirtioError):
    """A chain that is no request of its device: there is not even room to say so."""

    code = "virtio.request"


class BackingFileError(VirtioError):
    """What a drive is to be served from cannot be: ``errno`` is 0 unless a call failed."""

    code = "virtio.backing_file"

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


class OverlayError(VirtioError):
    """An overlay that cannot be used: it is none, it is damaged or in use, or its base is another one."""

    code = "virtio.overlay"


class VhostUserError(VirtioError):
    """A vhost-user back end cannot be used, is gone, or says what it must not."""

    code = "virtio.vhost_user"


class DriverError(VirtioError):
    """The driver's side was used wrongly, or the device broke the rules of the used ring."""

    code = "virtio.driver"


class SettingsError(VirtioError):
    """What a device is to be made of, or changed to, is none of its kind."""

    code = "virtio.settings"
