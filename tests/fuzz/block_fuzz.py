"""Hostile block requests: every form of the device against the structured one, and every form against any ring.

``python -m tests.fuzz.block_fuzz SEED COUNT [EXTENSION]``; an example is a ring, ``chains`` counts heads. The same
ring, memory and file for each form: afterwards all three are the same, and so is whether the device needs a reset. (Of
a ring that does, what was done before may be shown or not: nothing of it counts after a reset.) EXTENSION is another
build of the C one, for a process with sanitizers, which reserves more addresses than a limit allows.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from base import native_loops
from base.event_manager import EventManager
from ipc.guest_memory import GuestMemory
from tests.harness import fuzzing
from tests.harness.drives import SECTORS, SIZE, backing_file
from tests.harness.hostile_rings import scribble
from tests.harness.virtio_devices import Notifications
from tests.harness.virtqueues import DATA, HIGH, MIB, RINGS, TABLES, Pair, guest_memory, make_pair
from virtio import abi
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.file_engine import FileEngine
from virtio.block.flat import flat_loop
from virtio.device import Activation
from virtio.driver import Buffer
from virtio.errors import DriverError

TYPES = (0, 0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, 0xFFFF_FFFF)
SECTORS_TRIED = (0, 1, 5, 60, SECTORS - 1, SECTORS, 1 << 55, (1 << 64) - 1)
LENGTHS = (512, 512, 4096, 1024, 100, 0, SIZE, SIZE + 512)
ROUNDS = 3
#: What is compared of guest memory: rings, tables, headers, data.
WINDOWS = (
    *((RINGS, 0x2000), (TABLES, 0x1_0000), (DATA, 0x1_2000), (MIB, 0x1_2000)),
    *((MIB - 512, 512), (2 * MIB - 512, 512)),
)
#: Where a region ends: a buffer that begins here may be in it, or not all of it.
ENDS = (MIB - 512, MIB - 16, MIB - 1, MIB, HIGH + MIB - 512, HIGH + MIB - 16, HIGH + MIB - 1, HIGH + MIB)
_CONTENT = random.Random(1).randbytes(SIZE)


class Structured(Block):
    """The reference."""

    def _loop_for(self, queue, number):
        return self._structured_loop(queue, number), queue.arm


class Flat(Block):
    """The fastest in plain Python."""

    def _loop_for(self, queue, number):
        return flat_loop(self, queue, number), queue.arm


class Native(Block):
    """The extension; it is what serves, and not what serves without it."""

    def _loop_for(self, queue, number):
        made = super()._loop_for(queue, number)
        assert self._takes
        return made


FORMS: dict[str, type[Block]] = {"structured": Structured, "flat": Flat}


def offer(pair: Pair, chooser: random.Random) -> None:
    """Offer requests, most of them sound."""
    for _ in range(chooser.choice((1, 2, 5, 16))):
        base = chooser.choice((DATA, HIGH)) + 0x100 * chooser.randrange(16)
        type = chooser.choice(TYPES)
        header = abi.VIRTIO_BLK_REQ.pack(type, chooser.choice((0, 0xFFFF_FFFF)), chooser.choice(SECTORS_TRIED))
        pair.memory.write(base, header)
        place = chooser.choice((DATA, HIGH)) + 0x2000 + chooser.randrange(64)
        status = Buffer(place, chooser.choice((1, 1, 1, 5)), True)
        count = chooser.choice((1, 1, 1, 1, 0, 2, 3))
        if chooser.random() < 0.02:
            count = chooser.choice((64, 65, 13))
        data = [
            Buffer(start + 0x3000 + 0x1000 * chooser.randrange(8), chooser.choice(LENGTHS), type != 1)
            for start in chooser.choices((DATA, HIGH), k=count)
        ]
        if type in (11, 13):
            data = [Buffer(base + 0x40, 16)]
            segment = (chooser.choice(SECTORS_TRIED), chooser.choice((0, 1, 8, 65)), chooser.choice((0, 0, 1, 2)))
            pair.memory.write(base + 0x40, abi.VIRTIO_BLK_SEGMENT.pack(*segment))
        if data and chooser.random() < 0.05:
            data[-1] = data[-1]._replace(address=chooser.choice(ENDS))
        if chooser.random() < 0.02:
            status = status._replace(address=chooser.choice(ENDS))
        if chooser.random() < 0.02:
            base = chooser.choice(ENDS)
        front = [Buffer(base, 16)] if chooser.random() < 0.95 else [Buffer(base, 7), Buffer(base + 7, 9)]
        try:
            head = pair.driver.add([*front, *data, status], indirect=chooser.random() < 0.8)
        except DriverError:
            return
        if chooser.random() < 0.02:
            at = pair.driver.next_available - 1 & pair.config.size - 1
            pair.driver.available[2 + at] = chooser.choice((head, 0, 15, 16, 0xFFFF))


class Form:
    """One form of the device with memory and a file of its own."""

    def __init__(self, kind: type[Block], memory: GuestMemory) -> None:
        self.memory = memory
        self.kind = kind
        self.file = backing_file(_CONTENT)
        self.events = EventManager()

    def run(self, seed: str, read_only: bool) -> tuple[Any, ...]:
        """Serve the rings of a seed; return everything that can be seen afterwards."""
        chooser = random.Random(seed)
        fd = self.file.fd
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, _CONTENT, 0)
        view = self.memory.view
        for start, length in WINDOWS:
            view[start : start + length] = bytes(length)
        self.file.read_only = read_only
        device = self.kind("drive", FileEngine(self.file), BlockSettings(read_only, False, True, 1, 0))
        device._identity = b"the same for all".ljust(20, b"\0")
        features = device.features()
        if chooser.random() < 0.1:
            features &= ~chooser.choice((abi.VIRTIO_F_EVENT_IDX, abi.VIRTIO_F_INDIRECT_DESC))
        pair = make_pair(self.memory, chooser.choice((16, 16, 16, 128)), features)
        notify = Notifications()
        number = self.events.add_subscriber(device)
        device.activate(Activation(self.memory, (pair.queue,), features, notify))
        chains = 0
        for _ in range(ROUNDS):
            offer(pair, chooser)
            scribble(pair, chooser, chooser.choice((0, 0, 0, 1, 2)))
            pair.driver.publish()
            device.notified(0)
            chains += pair.driver.next_available - chains
            if notify.resets:  # what the driver sees of such a batch may differ, and what it offers next
                break
            try:
                for used in pair.driver.take_used():
                    pair.driver.free(used.head)
            except DriverError:
                pass  # a head that was offered twice: both came back
        device.stop()
        self.events.remove_subscriber(number)
        broken = bool(notify.resets)
        seen = tuple(bytes(view[start : start + length]) for start, length in WINDOWS) if not broken else ()
        counted = {} if broken else device.collect().values
        content = b"" if broken else os.pread(fd, SIZE + 1, 0)
        return broken, chains, notify.used_count if not broken else 0, seen, content, counted


def main() -> None:
    """Run examples."""
    seed, count, extension = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if native_loops.load(*extension) is not None:
        FORMS["native"] = Native
    fuzzing.limit(address_space=not extension)
    outcomes: Counter[str] = Counter(examples=0, chains=0, refused=0)
    memories: list[Callable[..., Any]] = []
    forms = {}
    for name, kind in FORMS.items():
        context = guest_memory()
        memories.append(context.__exit__)
        forms[name] = Form(kind, context.__enter__())
    while outcomes["chains"] < count:
        example = f"{seed}-{outcomes['examples']}"
        with fuzzing.example(outcomes):
            read_only = random.Random(example).random() < 0.1
            results = {name: form.run(example, read_only) for name, form in forms.items()}
        expected = results["structured"]
        for name, result in results.items():
            for part, (one, other) in enumerate(zip(result, expected, strict=True)):
                assert one == other, (name, example, part)
        outcomes["chains"] += expected[1]
        outcomes["refused"] += expected[0]
    print(json.dumps({**outcomes, "forms": list(FORMS)}))


if __name__ == "__main__":
    main()
