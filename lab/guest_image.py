"""Bootable guests from stock parts: Debian's cloud kernel, unmodified, and busybox with an init that tests script.

`python -m lab.guest_image` builds what is missing and prints the paths.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from devtool.project import DevError, cache_directory, say
from lab.cpio import CpioWriter
from lab.debian import BUSYBOX, Kernel, cache_lock, ensure_kernel, module_order, place
from lab.vmlinux import ensure_vmlinux

METAPACKAGE = "linux-image-cloud-amd64"
#: Virtio device type (virtio specification 1.2, section 5) → module of its driver.
DRIVERS = {
    1: "virtio_net",
    2: "virtio_blk",
    3: "virtio_console",
    4: "virtio_rng",
    5: "virtio_balloon",
    19: "vmw_vsock_virtio_transport",
    24: "virtio_mem",
    26: "virtiofs",
    27: "virtio_pmem",
}
TRANSPORTS = ("virtio_mmio", "virtio_pci")
#: Loaded only when cellblock.modules= names them.
OTHER_MODULES = ("nd_pmem", "ptp_kvm", "button", "evdev", "overlay", "squashfs", "ext4")
_HERE = Path(__file__).resolve().parent


class GuestImage(NamedTuple):
    """Files that boot. All are in the cache: do not write to them."""

    vmlinuz: Path  #: the distribution's bzImage
    vmlinux: Path  #: the ELF kernel that is packed in it
    initramfs: Path
    release: str  #: as `uname -r` shows it


def ensure() -> GuestImage:
    """Return the guest image; builds what is missing. Raises DevError if Debian's kernel cannot be had."""
    kernel = ensure_kernel(METAPACKAGE)
    digest = hashlib.sha256(kernel.package.encode())
    for source in (Path(__file__), _HERE / "cpio.py", _HERE / "guest_init.sh", BUSYBOX):
        digest.update(source.read_bytes())
    initramfs = cache_directory() / "guest" / f"{digest.hexdigest()[:32]}.cpio"
    if not initramfs.is_file():
        with cache_lock():
            place(initramfs, _archive(kernel))
    return GuestImage(kernel.vmlinuz, ensure_vmlinux(kernel), initramfs, kernel.release)


def command_line(run: str = "", *, script: str = "", modules: str = "", end: str = "") -> str:
    """Return the kernel parameters that make the guest's init run shell commands; see guest_init.sh."""
    parameters = {
        "run": urllib.parse.quote(run, safe=""),
        "script": script,
        "modules": modules,
        "end": end,
    }
    return " ".join(f"cellblock.{name}={value}" for name, value in parameters.items() if value)


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return an initramfs archive to append to the image's: further files (name without leading slash → content).

    `cellblock/script` is run by the guest's init.
    """
    output = io.BytesIO()
    writer = CpioWriter(output)
    for name, content in files.items():
        writer.file(name, content, 0o755)
    writer.close()
    return output.getvalue()


def _archive(kernel: Kernel) -> bytes:
    """Return the guest's initramfs, unpacked: the guest then spends no time on unpacking it."""
    output = io.BytesIO()
    writer = CpioWriter(output)
    for folder in ("dev", "proc", "sys", "root"):
        writer.folder(folder)
    writer.file("bin/busybox", BUSYBOX, 0o755)
    applets = subprocess.run([BUSYBOX, "--list"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            writer.link(f"bin/{applet}", "busybox")
    writer.file("init", _HERE / "guest_init.sh", 0o755)
    placed: set[Path] = set()
    for name in (*TRANSPORTS, *DRIVERS.values(), *OTHER_MODULES):
        order = module_order(kernel, [name])
        for module in order:
            if module not in placed:
                placed.add(module)
                writer.file(f"modules/{_loaded_name(module)}.ko", module)
        needs = "".join(f"{_loaded_name(module)}.ko\n" for module in order)
        writer.file(f"modules/needs/{name}", needs.encode())
    for number, name in DRIVERS.items():
        writer.file(f"modules/virtio/0x{number:04x}", f"{name}\n".encode())
    writer.close()
    content = output.getvalue()
    return content + bytes(-len(content) % 512)  # so that another archive can be appended


def _loaded_name(module: Path) -> str:
    """Return the name under which /sys/module shows it."""
    return module.stem.replace("-", "_")


def main() -> int:
    """Print the image's parts, one a line: NAME=PATH."""
    try:
        image = ensure()
    except DevError as error:
        say(f"error: {error}")
        return 1
    for name, value in image._asdict().items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
