"""What the guest boots: PUT /boot-source."""

from __future__ import annotations

import os

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.boot.cmdline import DEFAULT_COMMAND_LINE, Cmdline
from vmm.boot.errors import CmdlineError
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_input
from vmm.json.schema import STRING, Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class BootSourceError(VmmError):
    """PUT /boot-source is refused."""

    code = "vmm.boot_source"


class BootSourceConfig(NamedTuple):
    """Body of PUT /boot-source. Without ``boot_args`` the default command line is used."""

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Return the ``boot-source`` section of GET /vm/config."""
        return {
            "kernel_image_path": self.kernel_image_path,
            "initrd_path": self.initrd_path,
            "boot_args": self.boot_args,
        }


class BootSource:
    """A boot source whose files are open: what was there at the time of the request is what will be booted.

    ``kernel_fd`` and ``initrd_fd`` (-1: no initrd) are positioned at 0 and read with pread by the builder, so that a
    start that failed can be repeated. ``command_line`` is the client's, or the default, without additions.
    """

    __slots__ = ("config", "kernel_fd", "initrd_fd", "command_line")

    def __init__(self, config: BootSourceConfig) -> None:
        """Check the command line and open the files. Raises BootSourceError."""
        self.config = config
        self.kernel_fd = -1
        self.initrd_fd = -1
        try:
            self.kernel_fd = open_input(config.kernel_image_path)
        except FileOpenError as error:
            raise BootSourceError(f"The kernel file cannot be opened: {error}") from error
        try:
            if config.initrd_path is not None:
                self.initrd_fd = open_input(config.initrd_path)
            self.command_line = checked_command_line(config.boot_args)
        except FileOpenError as error:
            self.close_files()
            raise BootSourceError(
                f"The initrd file cannot be opened due to invalid path or invalid permissions. {error}"
            ) from error
        except BootSourceError:
            self.close_files()
            raise

    def close_files(self) -> None:
        """Close the descriptors. Idempotent."""
        for fd in (self.kernel_fd, self.initrd_fd):
            if fd >= 0:
                os.close(fd)
        self.kernel_fd = self.initrd_fd = -1


def checked_command_line(boot_args: str | None) -> str:
    """Return the command line for ``boot_args``. Raises BootSourceError if the builder could not use it."""
    try:
        Cmdline(boot_args)
    except CmdlineError as error:
        raise BootSourceError(f"The kernel command line is invalid: {error}") from error
    return DEFAULT_COMMAND_LINE if boot_args is None else boot_args


BOOT_SOURCE = Object(
    "BootSourceConfig",
    BootSourceConfig,
    Field("kernel_image_path", STRING),
    Field("initrd_path", Option(STRING)),
    Field("boot_args", Option(STRING)),
)
