"""Hostile virtqueues against the queue, in a process of its own: limits of memory and of time.

``python -m tests.fuzz.virtqueue_fuzz TARGET SEED COUNT``; an example is a ring; ``chains`` counts heads.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable

from ipc.guest_memory import GuestMemory
from tests.harness import fuzzing
from tests.harness.hostile_rings import ChangingView, check_chain, random_buffers, scribble
from tests.harness.virtqueues import FEATURES, Pair, guest_memory, make_pair
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC
from virtio.errors import DriverError, QueueError

SIZES = (1, 2, 16, 64)


def fill(pair: Pair, chooser: random.Random) -> None:
    """Offer chains until there is no room; some heads more than once, or none of the table's."""
    driver, size = pair.driver, pair.config.size
    for _ in range(size):
        try:
            driver.add(random_buffers(chooser), indirect=chooser.random() < 0.6)
        except DriverError:
            break
    if chooser.random() < 0.2:
        driver.available[2 + chooser.randrange(size)] = chooser.choice((0, size - 1, size, 0xFFFF))


def drain(pair: Pair, outcomes: Counter[str]) -> None:
    """Be a device that gives everything back at once."""
    queue = pair.queue
    limit = pair.config.size
    while True:
        try:
            chain = queue.pop()
        except QueueError:
            outcomes["chains"] += 1
            outcomes["refused"] += 1
            return
        if chain is None:
            queue.publish()
            assert not queue.arm()
            return
        outcomes["chains"] += 1
        assert limit > 0, "more chains than a queue holds"
        limit -= 1
        check_chain(pair, chain.readable, chain.writable)
        queue.add_used(chain, 1)


def wrong_words(memory: GuestMemory, chooser: random.Random, outcomes: Counter[str]) -> None:
    """A ring in which a few words are wrong."""
    features = FEATURES
    if chooser.random() < 0.1:
        features &= ~chooser.choice((VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC))
    pair = make_pair(memory, chooser.choice(SIZES), features)
    fill(pair, chooser)
    pair.driver.publish()
    scribble(pair, chooser, chooser.choice((0, 1, 1, 2, 5)))
    drain(pair, outcomes)


def changing_words(memory: GuestMemory, chooser: random.Random, outcomes: Counter[str]) -> None:
    """A ring that is sound, and changes between any two looks at it."""
    pair = make_pair(memory, chooser.choice(SIZES))
    fill(pair, chooser)
    pair.driver.publish()
    change: Callable[[], None] = lambda: scribble(pair, chooser)  # noqa: E731
    table = ChangingView(pair.queue.descriptors, change)
    pair.queue.descriptors = table  # type: ignore[assignment]
    index = ChangingView(pair.queue.available, change)
    pair.queue.available = index  # type: ignore[assignment]
    size = pair.config.size
    for _ in range(size):
        table.reads = 0
        try:
            chain = pair.queue.pop()
        except QueueError:
            outcomes["chains"] += 1
            outcomes["refused"] += 1
            return
        finally:
            assert table.reads <= 2 * size, "a descriptor was read more than once"
        if chain is None:
            return
        outcomes["chains"] += 1
        check_chain(pair, chain.readable, chain.writable)


TARGETS = {"wrong-words": wrong_words, "changing-words": changing_words}


def main() -> None:
    """Run examples of one target."""
    target, seed, count = TARGETS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    fuzzing.limit()
    outcomes: Counter[str] = Counter(examples=0, chains=0, refused=0)
    with guest_memory() as memory:
        while outcomes["chains"] < count:
            with fuzzing.example(outcomes):
                target(memory, random.Random(f"{seed}-{outcomes['examples']}"), outcomes)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
