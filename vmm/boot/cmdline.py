"""The kernel command line: what the client gave, what we append, and the arguments of init that stay last.

Rules and error texts are the interface that clients of Firecracker know; see also
Documentation/admin-guide/kernel-parameters.rst for `` -- `` and for double quotes. As there, the client's text may
hold any characters (white space at its ends goes, what is inside reaches the kernel as UTF-8) and only what is
appended must be printable ASCII. A NUL, at which the kernel would stop to read, is refused.
"""

from __future__ import annotations

from base.lean_typing import Iterable
from vmm import layout
from vmm.boot.errors import CmdlineError
from vmm.json.text import WHITE_SPACE

#: Used only when the client gives no ``boot_args`` at all.
DEFAULT_COMMAND_LINE = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
INIT_SEPARATOR = " -- "


class Cmdline:
    """A kernel command line of at most ``COMMAND_LINE_SIZE`` bytes with its NUL.

    ``boot_args`` are for the kernel, ``init_args`` follow the first `` -- `` outside double quotes and are for init.
    """

    __slots__ = ("boot_args", "init_args")

    def __init__(self, text: str | None = None) -> None:
        """Take the client's ``boot_args``, or the default when there are none. Raises CmdlineError."""
        text = DEFAULT_COMMAND_LINE if text is None else text
        if "\0" in text:
            raise CmdlineError("cmdline.nul", "Null terminator detected in the command line structure.")
        boot_args, init_args = _split(text)
        self.boot_args = boot_args.strip(WHITE_SPACE)
        self.init_args = init_args.strip(WHITE_SPACE)
        if self._size() > layout.COMMAND_LINE_SIZE:
            raise CmdlineError("cmdline.capacity", "Invalid cmdline capacity provided.")

    def _size(self) -> int:
        """Return the bytes of the line with its NUL."""
        init_size = len(INIT_SEPARATOR) + len(self.init_args.encode()) if self.init_args else 0
        return len(self.boot_args.encode()) + init_size + 1

    def append(self, text: str) -> None:
        """Add kernel parameters before the arguments of init. Raises CmdlineError and changes nothing then."""
        text = text.strip(WHITE_SPACE)
        if not (text.isascii() and text.isprintable()):
            raise CmdlineError("cmdline.ascii", "String contains a non-printable ASCII character.")
        if not text:
            return
        separator = " " if self.boot_args else ""
        if self._size() + len(separator) + len(text) > layout.COMMAND_LINE_SIZE:
            raise CmdlineError("cmdline.too_large", "Inserting string would make command line too long.")
        self.boot_args += separator + text

    def __str__(self) -> str:
        """Return the complete line without its NUL. Raises CmdlineError when there are arguments of init only."""
        if not self.init_args:
            return self.boot_args
        if not self.boot_args:
            raise CmdlineError("cmdline.init_only", "Cmdline cannot contain only init args.")
        return self.boot_args + INIT_SEPARATOR + self.init_args

    def to_bytes(self) -> bytes:
        """Return the line as the kernel reads it, UTF-8 with a NUL. Raises CmdlineError as ``str`` does."""
        return str(self).encode() + b"\0"


def root_parameters(device: str, read_only: bool) -> str:
    """Name the root device: ``device`` is ``/dev/vda`` or ``PARTUUID=…``."""
    return f"root={device} {'ro' if read_only else 'rw'}"


def virtio_mmio_parameter(address: int, size: int, gsi: int) -> str:
    """Announce one virtio-mmio device to kernels without ACPI (``virtio_mmio.device``). ``size`` is whole KiB."""
    assert size > 0 and size % 1024 == 0
    return f"virtio_mmio.device={size // 1024}K@{address:#x}:{gsi}"


def complete(cmdline: Cmdline, pci: bool, parameters: Iterable[str] = ()) -> None:
    """Append what every boot gets, then ``parameters`` in order. Raises CmdlineError."""
    if not pci:
        cmdline.append("pci=off")
    for parameter in parameters:
        cmdline.append(parameter)


def _split(text: str) -> tuple[str, str]:
    position = text.find(INIT_SEPARATOR)
    while position >= 0:
        if text.count('"', 0, position) % 2 == 0:
            return text[:position], text[position + len(INIT_SEPARATOR) :]
        position = text.find(INIT_SEPARATOR, position + 1)
    return text, ""
