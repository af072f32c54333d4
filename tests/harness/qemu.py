"""QEMU's own microvm, with the guest image: parts of guests are tried in it where no microVM of ours is needed."""

from __future__ import annotations

from lab.tsc import host_tsc_khz


def qemu(image, parameters, *, kernel=None, devices=(), initramfs=None):
    """Return the command line that boots a guest under QEMU's own microvm, its console on standard output."""
    append = f"console=ttyS0 reboot=t panic=-1 quiet tsc_early_khz={host_tsc_khz()} {parameters}"
    # fmt: off
    return [
        "qemu-system-x86_64", "-machine", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults",
        "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-kernel", str(kernel or image.vmlinux), "-initrd", str(initramfs or image.initramfs),
        "-append", append, *devices,
    ]
    # fmt: on
