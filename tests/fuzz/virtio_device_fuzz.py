"""Whole devices against hostile drivers: entropy, and block with each of its engines.

``python -m tests.fuzz.virtio_device_fuzz TARGET SEED COUNT``; an example is one activation, from fresh rings to the
stop; ``chains`` counts heads that were offered. Whatever the rings say: nothing but a need for a reset comes of it,
told once; a stop ends with nothing in flight, the device works afterwards; a sound driver gets every chain back; the
file of a read-only drive stays as it is, and that of any other keeps its size.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from base import native_loops
from base.event_manager import EventManager
from ipc.guest_memory import GuestMemory
from tests.fuzz import block_fuzz
from tests.harness import fuzzing
from tests.harness.drives import SIZE, backing_file, pattern
from tests.harness.event_loop import run_until
from tests.harness.hostile_rings import random_buffers, scribble
from tests.harness.virtio_devices import Notifications
from tests.harness.virtqueues import RINGS, TABLES, Pair, guest_memory, make_pair
from virtio import abi
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.block.uring_engine import UringEngine
from virtio.device import Activation, VirtioDevice
from virtio.driver import Buffer
from virtio.entropy import Entropy
from virtio.errors import DriverError
from virtio.rate_limiter import Bucket, RateLimiter

ROUNDS = 4
#: The rings of the second queue of a drive, which a sound driver uses.
SECOND = RINGS + 0x4000
#: Limits that are met now and then.
_LIMITS = (Bucket(4 << 20, 5), Bucket(2000, 5))


def offer_random(pair: Pair, chooser: random.Random) -> None:
    """Offer chains of any shape: what an entropy device gets."""
    for _ in range(chooser.choice((1, 2, 5, 16))):
        try:
            pair.driver.add(random_buffers(chooser), indirect=chooser.random() < 0.6)
        except DriverError:
            return


def offer_requests(pair: Pair, chooser: random.Random) -> None:
    """Offer block requests, and now and then something that is none."""
    (offer_random if chooser.random() < 0.05 else block_fuzz.offer)(pair, chooser)


def offer_randomness(pair: Pair, chooser: random.Random) -> None:
    """Offer what a driver of an entropy device does; some with too much, or the wrong way round."""
    if chooser.random() < 0.3:
        offer_random(pair, chooser)
        return
    for _ in range(chooser.choice((1, 2, 5, 16))):
        length = chooser.choice((1, 64, 4096, 65_536, 65_537, 1 << 20))
        try:
            pair.driver.add([Buffer(0x8_0000, min(length, 0x7_0000), True)], indirect=chooser.random() < 0.3)
        except DriverError:
            return


def entropy() -> VirtioDevice:
    return Entropy("rng")


def limited_entropy() -> VirtioDevice:
    return Entropy("rng", RateLimiter(*_LIMITS))


def sync() -> VirtioDevice:
    return Block("drive", FileEngine(backing_file()), BlockSettings(discard=True, writeback=True, queues=2))


def read_only() -> VirtioDevice:
    return Block("drive", FileEngine(backing_file(read_only=True)), BlockSettings(read_only=True, queues=2))


def io_uring() -> VirtioDevice:
    return Block("drive", UringEngine(backing_file()), BlockSettings(discard=True, writeback=True, queues=2))


def threads() -> VirtioDevice:
    settings = BlockSettings(discard=True, queues=2)
    return Block("drive", ThreadEngine(backing_file()), settings, RateLimiter(*_LIMITS))


TARGETS: dict[str, tuple[Callable[[], VirtioDevice], Callable[[Pair, random.Random], None]]] = {
    "entropy": (entropy, offer_randomness),
    "entropy-limited": (limited_entropy, offer_randomness),
    "block-sync": (sync, offer_requests),
    "block-read-only": (read_only, offer_requests),
    "block-io-uring": (io_uring, offer_requests),
    "block-threads-limited": (threads, offer_requests),
}


class Subject:
    """A device that lives through all examples, as it does through the resets of a guest."""

    def __init__(self, target: str, memory: GuestMemory, outcomes: Counter[str]) -> None:
        make, self.offer = TARGETS[target]
        self.device: Any = make()
        self.memory = memory
        self.outcomes = outcomes
        self.events = EventManager()
        self.events.add_subscriber(self.device)
        self.is_drive = isinstance(self.device, Block)

    def run(self, chooser: random.Random) -> None:
        """One activation."""
        notify = Notifications()
        features = self.device.features() & ~abi.VIRTIO_BLK_F_RO
        if chooser.random() < 0.1:
            features &= ~chooser.choice((abi.VIRTIO_F_EVENT_IDX, abi.VIRTIO_F_INDIRECT_DESC))
        pair = make_pair(self.memory, 16, features)
        queues = [pair.queue]
        sound = make_pair(self.memory, 16, features, SECOND) if self.is_drive else None
        if sound is not None:
            sound.driver.tables = TABLES + 0x8000
            queues.append(sound.queue)
        hostile = chooser.random() < 0.7
        self.device.activate(Activation(self.memory, tuple(queues), features, notify))
        for _ in range(ROUNDS):
            before = pair.driver.next_available
            self.offer(pair, chooser)
            self.outcomes["chains"] += pair.driver.next_available - before & 0xFFFF
            if hostile:
                scribble(pair, chooser, chooser.choice((0, 1, 2)))
            pair.driver.publish()
            self.device.notified(0)
            if sound is not None and chooser.random() < 0.2:
                self._ask(sound)
            self.events.run(0)
            self._take(pair)
        self._stop(chooser)
        assert len(notify.resets) <= 1, "told more than once"
        self.outcomes["refused"] += len(notify.resets)

    def _ask(self, sound: Pair) -> None:
        """A read of the second queue, whose driver keeps the rules."""
        place = 0xF_0000
        sound.memory.write(place, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 1))
        buffers = [Buffer(place, 16), Buffer(place + 0x1000, 512, True), Buffer(place + 0x100, 1, True)]
        try:
            sound.driver.add(buffers)
        except DriverError:
            return
        sound.driver.publish()
        self.device.notified(1)

    def _take(self, pair: Pair) -> None:
        try:
            for used in pair.driver.take_used():
                pair.driver.free(used.head)
        except DriverError:
            pass  # a head that was offered twice, or the ring was written to

    def _stop(self, chooser: random.Random) -> None:
        deferral = self.device.stop()
        if deferral is not None:
            run_until(self.events, lambda: deferral.done)
        assert self.device.stop() is None
        if self.is_drive:
            assert self.device.engine.in_flight == 0
            assert os.fstat(self.device.engine.file.fd).st_size == SIZE
            if self.device.read_only and chooser.random() < 0.02:
                assert os.pread(self.device.engine.file.fd, SIZE, 0) == pattern()
        self.device.save()
        self.device.reset()

    def close(self) -> None:
        """A last activation with a driver that keeps the rules: it gets everything back."""
        notify = Notifications()
        pair = make_pair(self.memory, 16, self.device.features() & ~abi.VIRTIO_BLK_F_RO)
        queues = (pair.queue,) + (None,) * (len(self.device.queue_sizes) - 1)
        self.device.activate(Activation(self.memory, queues, pair.queue.event_idx and abi.VIRTIO_F_VERSION_1, notify))
        self.memory.write(0xF_0000, bytes(16))
        for number in range(4):
            parts = [Buffer(0xF_0000, 16)] if self.is_drive else []
            pair.driver.add([*parts, Buffer(0xF_1000 + 512 * number, 513, True)])
        pair.driver.publish()
        self.device.notified(0)
        found: list[Any] = []

        def done() -> bool:
            found.extend(pair.driver.take_used())
            return len(found) == 4

        run_until(self.events, done)
        assert [used.written for used in found] == [513] * 4
        assert not notify.resets
        self._stop(random.Random(0))
        self.device.close()
        self.events.close()


def main() -> None:
    """Run examples of one target."""
    target, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    native_loops.load()
    fuzzing.limit()
    outcomes: Counter[str] = Counter(examples=0, chains=0, refused=0)
    begun = time.monotonic()
    with guest_memory() as memory:
        subject = Subject(target, memory, outcomes)
        while outcomes["chains"] < count:
            with fuzzing.example(outcomes):
                subject.run(random.Random(f"{seed}-{outcomes['examples']}"))
        subject.close()
    print(json.dumps({**outcomes, "seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
