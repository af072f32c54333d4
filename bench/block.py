"""Block devices without a guest: µs per request over bare preadv(2), and a device process next to qemu-storage-daemon.

Everything runs in turns, and ratios are formed within a round: the machine may have other work. Of each round the best
eighth counts for the first table. ``--rounds N`` (both tables), ``--only requests|pair``, ``--file PATH`` (by default
one of 256 MiB in TMPDIR, removed afterwards).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from base import native_loops
from base.event_manager import EventManager
from bench import block_pair
from bench.block_pair import Load, Result
from bench.measure import BenchError, median, spread, table
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from virtio.abi import VIRTIO_BLK_REQ
from virtio.block.backing_file import BackingFile, open_backing_file
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.engines import ASYNC, SYNC, make_engine
from virtio.block.flat import flat_loop
from virtio.device import Activation
from virtio.driver import Buffer, Driver, lay_out
from virtio.queue import Queue, QueueConfig

FILE_SIZE = 256 << 20
MEMORY_SIZE = 64 << 20
QUEUE_SIZE = 256
LENGTH = 4096
CHAINS = 64
BATCHES = (1, 8, 32)
#: Requests of a variant in a round, and in how many parts, of which the best counts.
PER_ROUND = 1024
PARTS = 8
RINGS, TABLES, HEADERS, STATUSES, DATA = 0x1000, 0x10_0000, 0x30_0000, 0x31_0000, 0x40_0000
#: µs per request over bare preadv: the aims, by variant and batch.
OVER = {("plain Python", 1): 2.5, ("plain Python", 32): 1.0, ("extension", 1): 0.8, ("extension", 32): 0.3}
LOOK_US = 50
MILLISECONDS = 500
#: Rates next to qemu-storage-daemon: the aims.
PAIRS: dict[tuple[Load, str], float] = {
    (Load(1, 4000), "plain Python"): 2.0,
    (Load(1, 4000), "extension"): 2.0,
    (Load(32, 4000), "plain Python"): 1.1,
    (Load(32, 4000), "extension"): 1.2,
    (Load(32, 0), "plain Python"): 1.0,
    (Load(32, 0), "extension"): 1.5,
    (Load(8, 0, 128 << 10), "plain Python"): 1.0,
    (Load(8, 0, 128 << 10), "extension"): 1.0,
}


class Silent:
    """A driver that is never interrupted: it looks itself."""

    def used(self, _queue: int) -> None:
        """Nobody waits."""

    def config_changed(self) -> None:
        """Nothing changes."""

    def needs_reset(self, reason: str) -> None:
        """The benchmark is wrong."""
        raise BenchError(reason)


class PlainPython(Block):
    """The device as it is where no extension was built."""

    def _loop_for(self, queue: Queue, number: int) -> tuple[Callable[[int], int], Callable[[], bool]]:
        if self.engine.event >= 0:
            return super()._loop_for(queue, number)
        return flat_loop(self, queue, number), queue.arm


class Variant:
    """One device with memory and a driver of its own; ``serve`` is what a notification of the driver leads to."""

    def __init__(self, path: str, engine: str, *, native: bool) -> None:
        fd = os.memfd_create("bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, MEMORY_SIZE)
        self.memory = GuestMemory(fd, MEMORY_SIZE, (MemoryRegion(0, MEMORY_SIZE, 0),))
        os.close(fd)
        self.file: BackingFile = open_backing_file(path, read_only=False)
        kind = Block if native else PlainPython
        self.device = kind("drive", make_engine(engine, self.file), BlockSettings(look_ns=0))
        self.events = EventManager()
        self.events.add_subscriber(self.device)
        features = self.device.features()
        config = QueueConfig(QUEUE_SIZE)
        lay_out(config, RINGS)
        self.driver = Driver(self.memory, config, features, TABLES)
        self.device.activate(Activation(self.memory, (config.ready(self.memory, features),), features, Silent()))
        self.heads = [self._chain(number) for number in range(CHAINS)]
        self.number = {head: number for number, head in enumerate(self.heads)}

    def _chain(self, number: int) -> int:
        header, status = HEADERS + 32 * number, STATUSES + 16 * number
        buffers = [Buffer(header, 16), Buffer(DATA + LENGTH * number, LENGTH, True), Buffer(status, 1, True)]
        return self.driver.write_chain(buffers, indirect=True)

    def batch(self, sectors: Sequence[int], first: int) -> int:
        """Read the blocks at these sectors; return the ns that the device took."""
        driver, memory = self.driver, self.memory
        for place, sector in enumerate(sectors, first):
            number = place % CHAINS
            memory.write(HEADERS + 32 * number, VIRTIO_BLK_REQ.pack(0, 0, sector))
            memory.write(STATUSES + 16 * number, b"\xee")
            driver.offer(self.heads[number])
        driver.publish()
        begun = time.perf_counter_ns()
        self.device.notified(0)
        while self.device.engine.in_flight:
            self.device._completed(0)
        spent = time.perf_counter_ns() - begun
        for used in driver.take_used():
            if memory.read(STATUSES + 16 * self.number[used.head], 1) != b"\0" or used.written != LENGTH + 1:
                raise BenchError("a request failed")
        return spent

    def check(self, sector: int) -> None:
        """What is read is what the file says. Raises BenchError."""
        self.batch([sector], 0)
        if self.memory.read(DATA, LENGTH) != os.pread(self.file.fd, LENGTH, sector << 9):
            raise BenchError("not what is in the file")

    def close(self) -> None:
        """Give everything back."""
        self.device.stop()
        self.device.close()
        self.events.close()


def random_sectors(count: int, size: int) -> list[int]:
    """Return where so many random blocks of the file begin."""
    return [random.randrange(size // LENGTH) * (LENGTH >> 9) for _ in range(count)]


def measure_requests(path: str, rounds: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Return (µs per request, the same over bare preadv) of each round, by variant and batch."""
    size = os.stat(path).st_size
    variants = {"plain Python": Variant(path, SYNC, native=False), "io_uring": Variant(path, ASYNC, native=False)}
    if native_loops.load() is not None:
        variants["extension"] = Variant(path, SYNC, native=True)
    else:
        print("the C extension is not built", file=sys.stderr)
    memory, fd, preadv = variants["plain Python"].memory, variants["plain Python"].file.fd, os.preadv
    views = [[memory.view[DATA + LENGTH * number :][:LENGTH]] for number in range(CHAINS)]

    def bare(sectors: Sequence[int], first: int) -> int:
        offsets = [sector << 9 for sector in sectors]
        begun = time.perf_counter_ns()
        for number, offset in enumerate(offsets, first):
            preadv(fd, views[number % CHAINS], offset)
        return time.perf_counter_ns() - begun

    def best(once: Callable[[Sequence[int], int], int], batch: int) -> float:
        """Return µs per request: of the parts of a round the best one."""
        taken = []
        place = 0
        for _ in range(PARTS):
            batches = max(1, PER_ROUND // PARTS // batch)
            spent = 0
            for _ in range(batches):
                spent += once(random_sectors(batch, size), place)
                place += batch
            taken.append(spent / (batches * batch) / 1000)
        return min(taken)

    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for batch in BATCHES:
            floor = best(bare, batch)
            found.setdefault(("bare preadv", batch), []).append((floor, 0.0))
            for name, variant in variants.items():
                us = best(variant.batch, batch)
                found.setdefault((name, batch), []).append((us, us - floor))
    for variant in variants.values():
        variant.check(random_sectors(1, size)[0])
        variant.close()
    return found


def show_requests(found: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    """Print the first table."""
    rows = []
    for (name, batch), values in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        us, over = ([value[column] for value in values] for column in (0, 1))
        aim = OVER.get((name, batch))
        judged = "" if aim is None else f"{aim:.1f}, {'reached' if median(over) <= aim else 'missed'}"
        rows.append([str(batch), name, spread(us, 2), spread(over, 2), f"{min(over):.2f}", judged])
    table(["batch", "device", "us a request", "over bare preadv", "least", "aim"], rows)


def measure_pairs(path: str, rounds: int) -> dict[tuple[Load, str], list[Result]]:
    """Return the results of each round, by load and server."""
    block_pair.build_driver()
    servers = block_pair.servers(LOOK_US)
    found: dict[tuple[Load, str], list[Result]] = {}
    for _ in range(rounds):
        for load in dict.fromkeys(load for load, _ in PAIRS):
            for name, server in servers.items():
                found.setdefault((load, name), []).append(block_pair.run(server, path, load, MILLISECONDS))
    return found


def show_pairs(found: dict[tuple[Load, str], list[Result]]) -> None:
    """Print the second table."""
    rows = []
    for (load, name), results in found.items():
        yardsticks = found.get((load, "qemu-storage-daemon"))
        ratios = [one.rate / other.rate for one, other in zip(results, yardsticks or (), strict=False)]
        aim = PAIRS.get((load, name))
        judged = ""
        if aim is not None and ratios:
            judged = f"{aim:.1f}, {'reached' if median(ratios) >= aim else 'missed'}"
        middle = {field: median([getattr(each, field) for each in results]) for field in Result._fields}
        rows.append([
            str(load.depth), f"{load.work_ns / 1000:g}", f"{load.length >> 10}", name, f"{middle['rate']:,.0f}",
            spread(ratios, 2) if ratios else "", f"{middle['p50']:.1f}", f"{middle['p99']:.0f}",
            f"{middle['device']:.1f} + {middle['driver']:.1f}", f"{middle['kicks']:.2f}", f"{middle['interrupts']:.2f}",
            judged,
        ])  # fmt: skip
    header = "depth,work us,KiB,device,a second,next to the daemon,p50 us,p99,CPU us (device + driver),kicks,calls,aim"
    table(header.split(","), rows)


@contextmanager
def disk(path: str | None) -> Iterator[str]:
    """A file in the page cache."""
    if path:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="cellblock-bench-") as made:
        for _ in range(FILE_SIZE >> 20):
            made.write(random.randbytes(1 << 20))
        made.flush()
        yield made.name


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="./dev bench block", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["requests", "pair"])
    parser.add_argument("--file")
    options = parser.parse_args(arguments)
    print(f"load before {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs, {options.rounds} rounds")
    with disk(options.file) as path:
        if options.only != "pair":
            show_requests(measure_requests(path, options.rounds))
        if options.only != "requests":
            show_pairs(measure_pairs(path, options.rounds))
    print(f"load after {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
