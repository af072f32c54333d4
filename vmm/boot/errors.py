"""Errors of ``vmm.boot``.

Where clients of Firecracker compare texts, the wire-level wording is kept: ``KERNEL_PREFIX`` and the sentences of
its kernel loader. What we know beyond that follows in parentheses.
"""

from __future__ import annotations

from vmm.errors import VmmError

KERNEL_PREFIX = (
    "System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: "
)
INITRD_PREFIX = "Error with initrd initialization: "


class BootError(VmmError):
    """Base of what goes wrong between a kernel file and the first instruction; ``code`` is stable."""

    code = "boot"

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class KernelError(BootError):
    """The kernel image cannot be loaded; the text is complete and fit for a client."""


class InitrdError(BootError):
    """The initrd cannot be loaded; the text is complete and fit for a client."""


class CmdlineError(BootError):
    """The kernel command line is refused.

    The text is the bare reason. Clients see it behind ``Boot source error: The kernel command line is invalid: ``
    when the boot source is set.
    """


class PayloadError(BootError):
    """The compressed payload of a bzImage is damaged, lies about its size or needs too much memory."""


class UnsupportedPayloadError(PayloadError):
    """The payload is packed in a way that is not unpacked here; the kernel can still unpack itself."""


class AcpiError(BootError):
    """The ACPI tables cannot describe this machine."""


class KernelCacheError(BootError):
    """The cache of unpacked kernels must not be used: its directory is not safe."""


def elf_error(code: str, sentence: str, detail: str = "") -> KernelError:
    """Build the error for a bad ELF image from the loader's ``sentence`` and our ``detail``."""
    return _loader_error(code, f"failed to load ELF kernel image: Kernel Loader: {sentence}", detail)


def bzimage_error(code: str, sentence: str, detail: str = "") -> KernelError:
    """Build the error for a bad bzImage from the loader's ``sentence`` and our ``detail``."""
    return _loader_error(code, f"failed to load bzImage kernel image: Kernel Loader: {sentence}", detail)


def memory_error(detail: str) -> KernelError:
    """Build the error for a kernel that does not fit into guest RAM."""
    return _loader_error("kernel.memory", "memory to load kernel image is not enough", detail)


def read_error(detail: str) -> KernelError:
    """Build the error for a kernel file that cannot be read at all."""
    return _loader_error("kernel.read", "Unable to read kernel image", detail)


def _loader_error(code: str, sentence: str, detail: str) -> KernelError:
    suffix = f" ({detail})" if detail else ""
    return KernelError(code, f"{KERNEL_PREFIX}Kernel Loader: {sentence}{suffix}")
