"""Rings that another process changes while the C extension reads them, without the interpreter lock.

``python -m tests.fuzz.native_fuzz SEED COUNT EXTENSION``: what comes out cannot be compared with anything; the device
must neither fall, nor write to what is not guest memory, nor raise. ``chains`` counts heads that were offered.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter

from base import native_loops
from base.event_manager import EventManager
from tests.fuzz.block_fuzz import Native, offer
from tests.harness import fuzzing
from tests.harness.drives import SIZE, backing_file
from tests.harness.hostile_rings import scribble
from tests.harness.virtio_devices import Notifications
from tests.harness.virtqueues import Pair, guest_memory, make_pair
from virtio.block.configuration import BlockSettings
from virtio.block.file_engine import FileEngine
from virtio.device import Activation
from virtio.errors import DriverError

ROUNDS = 50


def scribble_for_ever(pair: Pair, seed: int) -> None:
    """Be a guest that changes its rings all the time; its parent ends it."""
    chooser, parent = random.Random(f"{seed}-scribbler"), os.getppid()
    while os.getppid() == parent:
        before = bytes(pair.memory.view[0x1000:0x6000]) if chooser.random() < 0.5 else b""
        scribble(pair, chooser, 4)
        if before:  # only for a moment: otherwise nothing sound would be left
            pair.memory.view[0x1000:0x6000] = before


def run(pair: Pair, chooser: random.Random, device: Native, notify: Notifications, outcomes: Counter[str]) -> None:
    """Some rounds of one activation."""
    features = device.features()
    pair = make_pair(pair.memory, 16, features)
    device.activate(Activation(pair.memory, (pair.queue,), features, notify))
    before = len(notify.resets)
    for _ in range(ROUNDS):
        offered, begun = pair.driver.next_available, pair.queue.next_used
        offer(pair, chooser)
        pair.driver.publish()
        device.notified(0)
        outcomes["chains"] += pair.driver.next_available - offered & 0xFFFF
        outcomes["served"] += pair.queue.next_used - begun & 0xFFFF
        try:
            for used in pair.driver.take_used():
                pair.driver.free(used.head)
        except DriverError:
            break  # the used ring was scribbled at, or a head came back twice
        if len(notify.resets) > before:
            break
    device.stop()
    device.reset()
    outcomes["resets"] += len(notify.resets) - before


def main() -> None:
    """Run examples."""
    seed, count, extension = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    assert native_loops.load(extension) is not None
    fuzzing.limit(address_space=False)
    outcomes: Counter[str] = Counter(examples=0, chains=0, served=0, resets=0)
    with guest_memory() as memory:
        pair = make_pair(memory, 16)
        scribbler = os.fork()
        if scribbler == 0:
            scribble_for_ever(pair, seed)
            os._exit(0)
        try:
            file = backing_file()
            device = Native("drive", FileEngine(file), BlockSettings(look_ns=0))
            notify, events = Notifications(), EventManager()
            events.add_subscriber(device)
            while outcomes["chains"] < count:
                with fuzzing.example(outcomes):
                    run(pair, random.Random(f"{seed}-{outcomes['examples']}"), device, notify, outcomes)
            assert os.fstat(file.fd).st_size == SIZE
        finally:
            os.kill(scribbler, signal.SIGKILL)
            os.waitpid(scribbler, 0)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
