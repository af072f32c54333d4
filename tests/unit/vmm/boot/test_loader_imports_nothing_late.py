"""Inside the jail nothing can be imported: after warm() every way through the loader must do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.harness import kernel_images as images

ROOT = Path(__file__).resolve().parents[4]

#: Runs in an interpreter of its own; the arguments are a cache directory and kernel files.
PROGRAM = """
import os, sys
from vmm import layout
from vmm.boot import loader
from vmm.boot.cmdline import Cmdline
from vmm.boot.errors import BootError
from ipc.guest_memory import GuestMemory

loader.warm()
loaded = set(sys.modules)
sys.path.clear()
sys.meta_path.clear()
cache = os.open(sys.argv[1], os.O_RDONLY)
outcomes = []
for path in sys.argv[2:] * 2:
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, 32 << 20)
    memory = GuestMemory(memfd, 32 << 20, layout.ram_regions(32 << 20))
    kernel = os.open(path, os.O_RDONLY)
    try:
        image = loader.load_kernel(memory, kernel, Cmdline(), kernel, cache_fd=cache)
        outcomes.append(image.payload.cache.split()[0] if image.payload else "loaded")
    except BootError as error:
        outcomes.append(error.code)
    memory.close()
    os.close(memfd)
    os.close(kernel)
print(*outcomes, "late:", *sorted(set(sys.modules) - loaded))
"""


def test_nothing_is_imported_after_warming_up(tmp_path: Path) -> None:
    kernel = images.small_kernel()
    damaged = bytearray(images.compress("xz", kernel))
    damaged[len(damaged) // 2] ^= 0xFF
    files = {
        "vmlinux": kernel,
        "gzip": images.bzimage(images.compress("gzip", kernel)),
        "xz": images.bzimage(images.compress("xz", kernel)),
        "zstd": images.bzimage(images.compress("zstd", kernel)),
        "lz4": images.bzimage(images.compress("lz4", kernel)),
        "damaged": images.bzimage(bytes(damaged)),
        "garbage": b"no kernel",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache), *(str(tmp_path / name) for name in files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = "loaded stored stored stored off payload.damaged kernel.bzimage.invalid"
    second = "loaded hit hit hit off payload.damaged kernel.bzimage.invalid"
    assert done.stdout.split() == [*first.split(), *second.split(), "late:"]
