"""A device process against a driver process on one ring: requests a second, latency, notifications, processor time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.block_cell import queue_config
from bench.measure import BenchError
from bench.storage_daemon import StorageDaemon
from devtool import native
from devtool.project import PYTHON, ROOT

MEMORY_SIZE = 64 << 20
DRIVER = ROOT / "build" / "bench" / "block_driver"
SOURCE = Path(__file__).with_name("block_driver.c")
#: A halted vCPU is looked after for so long before its thread sleeps (kvm.halt_poll_ns).
HALT_POLL_NS = 200_000
_TIMEOUT = 60


#: Serves a file through a ring: with (path, (guest memory, kick, interrupt)) as its pid.
Server = Callable[[str, tuple[int, int, int]], AbstractContextManager[int]]


class Load(NamedTuple):
    """What the driver does: requests in flight, processor time that each costs the guest, bytes of each."""

    depth: int
    work_ns: int
    length: int = 4096


class Result(NamedTuple):
    """``device`` and ``driver``: µs of processor time per request; kicks and interrupts per request."""

    rate: float
    p50: float
    p99: float
    done: int
    kicks: float
    interrupts: float
    driver: float
    device: float


def build_driver() -> None:
    """Compile the driver. Raises BenchError."""
    cc = native.compiler()
    if cc is None:
        raise BenchError("no C compiler for the driver")
    DRIVER.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([cc, "-O2", "-Wall", "-Wextra", str(SOURCE), "-o", str(DRIVER)], check=True)


def processor_ns(pid: int) -> int:
    """Return what the threads of a process have run so far."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


@contextmanager
def cell(loop: str, look_us: int, path: str, descriptors: tuple[int, int, int]) -> Iterator[int]:
    """Our device in a process of its own; gives its pid."""
    command = [str(PYTHON), "-m", "bench.block_cell", loop, "Sync", str(look_us), path, *map(str, descriptors)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, pass_fds=descriptors, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise BenchError("the device process did not start")
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def storage_daemon(aio: str, path: str, descriptors: tuple[int, int, int]) -> Iterator[int]:
    """qemu-storage-daemon; gives its pid."""
    daemon = StorageDaemon(path, aio, descriptors, queue_config())
    try:
        yield daemon.pid
    finally:
        daemon.close()


def servers(look_us: int) -> dict[str, Server]:
    """Return what is compared, by name; the first is the yardstick, if it is installed."""
    found: dict[str, Server] = {}
    if shutil.which("qemu-storage-daemon"):
        found["qemu-storage-daemon"] = partial(storage_daemon, "io_uring")
    else:
        print("qemu-storage-daemon is not installed (Debian: qemu-system-common)", file=sys.stderr)
    found["plain Python"] = partial(cell, "flat", look_us)
    found["extension"] = partial(cell, "native", look_us)
    return found


def separate(pid: int) -> Callable[[], None] | None:
    """Put the threads of a device on one CPU; return what puts its driver on another, if there are two.

    A scheduler that has other work keeps two processes which wake each other on one CPU: then it is measured, not they.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return None
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpus[0]})
    return partial(os.sched_setaffinity, 0, {cpus[1]})


def run(server: Server, path: str, load: Load, milliseconds: int) -> Result:
    """Run one of them for so long. Raises BenchError."""
    memory = os.memfd_create("bench", 0)
    os.ftruncate(memory, MEMORY_SIZE)
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, 0)
    descriptors = (memory, kick, call)
    config = queue_config()
    rings = (config.descriptor_table, config.available_ring, config.used_ring)
    numbers = (*descriptors, *rings, load.depth, load.work_ns, milliseconds, load.length, os.stat(path).st_size)
    command = [str(DRIVER), *map(str, numbers), str(HALT_POLL_NS)]
    try:
        with server(path, descriptors) as pid:
            placed = separate(pid)
            before = processor_ns(pid)
            done = subprocess.run(
                command, pass_fds=descriptors, preexec_fn=placed, capture_output=True, text=True, timeout=_TIMEOUT,
                check=False,
            )  # fmt: skip
            if done.returncode:
                raise BenchError(f"the driver ended with status {done.returncode}: {done.stderr}")
            shown = json.loads(done.stdout)
            return Result(**shown, device=(processor_ns(pid) - before) / 1000 / shown["done"])
    finally:
        for each in descriptors:
            os.close(each)
