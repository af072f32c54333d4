"""The lab's kernel and initramfs."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

from devtool.project import cache_directory
from lab.cpio import CpioWriter
from lab.debian import BUSYBOX, Kernel, cache_lock, ensure_kernel, module_order, place
from lab.vmlinux import ensure_vmlinux

METAPACKAGE = "linux-image-amd64"
#: Modules loaded at boot, with parameters. Others can be had inside with modprobe.
MODULES = {
    "virtio_pci": "",
    "9pnet_virtio": "",
    "9p": "",
    "overlay": "",
    "virtio_console": "",
    "virtio_rng": "",
    "kvm": "",
    "kvm-amd": "npt=1 nested=1",
    "tun": "",
    "loop": "",
}
_HERE = Path(__file__).resolve().parent


class LabImage(NamedTuple):
    """What QEMU boots."""

    vmlinux: Path  #: unpacked on the host: the emulated machine would take seconds for it
    initramfs: Path
    modules: Path


def ensure() -> LabImage:
    """Return the lab's image; builds what is missing. Raises DevError if Debian's kernel cannot be had."""
    kernel = ensure_kernel(METAPACKAGE)
    digest = hashlib.sha256(f"{kernel.package}\n{MODULES}\n".encode())
    ours = ("cpio.py", "init.sh", "agent.sh", "keep_vm.py")
    for source in (Path(__file__), *(_HERE / name for name in ours), BUSYBOX):
        digest.update(source.read_bytes())
    initramfs = cache_directory() / "lab" / f"{digest.hexdigest()[:32]}.cpio"
    if not initramfs.is_file():
        with cache_lock():
            _build(kernel, initramfs)
    return LabImage(ensure_vmlinux(kernel), initramfs, kernel.modules)


def _build(kernel: Kernel, initramfs: Path) -> None:
    output = io.BytesIO()
    archive = CpioWriter(output)
    for folder in ("dev", "proc", "sys", "modules"):
        archive.folder(folder)
    archive.file("bin/busybox", BUSYBOX, 0o755)
    for applet in ("sh", "mount", "insmod", "mkdir", "cp", "ln", "ip", "hostname", "uname", "sleep", "switch_root"):
        archive.link(f"bin/{applet}", "busybox")
    archive.file("init", _HERE / "init.sh", 0o755)
    archive.file("agent.sh", _HERE / "agent.sh", 0o755)
    archive.file("keep_vm.py", _HERE / "keep_vm.py")
    order = module_order(kernel, list(MODULES))
    parameters = {name.replace("-", "_"): text for name, text in MODULES.items()}
    lines = []
    for module in order:
        archive.file(f"modules/{module.name}", module)
        lines.append(f"{module.name} {parameters.get(module.stem.replace('-', '_'), '')}".rstrip() + "\n")
    archive.file("modules/order", "".join(lines).encode())
    archive.close()
    place(initramfs, output.getvalue())
