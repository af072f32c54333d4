"""Wherever a process ends that serves a queue out of order: another one goes on, each chain is answered once."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.virtqueues import DATA, FEATURES, Pair, guest_memory, make_pair
from virtio.driver import Buffer
from virtio.errors import QueueError
from virtio.in_flight import TrackedQueue, recover, region_size, table_words, tables_of
from virtio.queue import Chain, QueueState

SIZE = 8


class EndedError(Exception):
    """The process has ended."""


class Ending:
    """Words of shared memory to which a process writes that ends before one of its stores."""

    def __init__(self, words: memoryview, stores: list[int]) -> None:
        self._words = words
        self._left = stores

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if not self._left[0]:
            raise EndedError
        self._left[0] -= 1
        self._words[index] = value

    def __len__(self) -> int:
        return len(self._words)


class Process:
    """Serves the queue until it ends before its ``stores``-th store."""

    def __init__(self, pair: Pair, table: memoryview, stores: int, state: QueueState | None) -> None:
        left = [stores]
        again: tuple[int, ...] = ()
        stands = state or pair.queue.state()
        if state is not None:
            next_available, next_used, again = recover(pair.memory, state, table)
            stands = state._replace(next_available=next_available, next_used=next_used)
        queue = self.queue = TrackedQueue(pair.memory, FEATURES, stands, table, again)
        queue.used = Ending(queue.used, left)  # type: ignore[assignment]
        queue.used_elements = Ending(queue.used_elements, left)  # type: ignore[assignment]
        queue._in_flight = Ending(table, left)  # type: ignore[assignment]
        self.begun: list[Chain] = []

    def take(self) -> None:
        chain = self.queue.pop()
        if chain is not None:
            self.begun.append(chain)

    def take_and_undo(self) -> None:
        if self.queue.pop() is not None:
            self.queue.undo_pop()

    def give_back(self, which: int) -> None:
        if self.begun:
            self.queue.add_used(self.begun.pop(which % len(self.begun)), 1)

    def publish(self) -> None:
        self.queue.publish()


@contextmanager
def queue_and_table(size: int = SIZE) -> Iterator[tuple[Pair, memoryview]]:
    region = mmap.mmap(-1, region_size((size,)))
    with guest_memory() as memory, memoryview(region) as view:
        (table,) = tables_of(view, (size,))
        yield make_pair(memory, size), table
        table.release()


STEPS = st.one_of(
    st.just(("offer", 0)),
    st.just(("offer", 0)),
    st.just(("take", 0)),
    st.just(("take", 0)),
    st.just(("undo", 0)),
    st.tuples(st.just("give"), st.integers(0, SIZE)),
    st.just(("publish", 0)),
    st.just(("collect", 0)),
)


@pytest.mark.soak("virtio")
def test_each_chain_is_answered_once(scale):
    @settings(max_examples=scale(300, 20_000), deadline=None)
    @given(st.lists(STEPS, max_size=60), st.lists(st.integers(0, 25), max_size=8))
    def run(steps: list[tuple[str, int]], ends: list[int]) -> None:
        with queue_and_table() as (pair, table):
            World(pair, table, ends).run(steps)

    run()


class World:
    """The driver, and the processes that serve its queue, one after the other."""

    def __init__(self, pair: Pair, table: memoryview, ends: list[int]) -> None:
        self.pair = pair
        self.table = table
        self.ends = [*ends, 1 << 30]
        self.offered = self.answered = 0
        self.open: set[int] = set()
        self.start = pair.queue.state()
        self.process = Process(pair, table, self.ends.pop(0), None)

    def run(self, steps: list[tuple[str, int]]) -> None:
        for name, argument in steps:
            self.act(name, argument)
        for _ in range(len(self.ends) + 1):  # until nothing is open, whoever ends meanwhile
            for _ in range(2 * SIZE):
                self.act("take", 0)
            for _ in range(2 * SIZE):
                self.act("give", 0)
            self.act("publish", 0)
        self.act("collect", 0)
        assert not self.open
        assert self.answered == self.offered
        assert not any(self.table[1:])
        assert self.process.queue.state().next_available == self.process.queue.state().next_used

    def act(self, name: str, argument: int) -> None:
        if name == "offer":
            if len(self.open) < SIZE:
                self.open.add(self.pair.driver.add([Buffer(DATA, 16, True)]))
                self.pair.driver.publish()
                self.offered += 1
            return
        if name == "collect":
            for used in self.pair.driver.take_used():
                self.open.remove(used.head)  # a KeyError, if it comes twice
                self.answered += 1
            return
        process = self.process
        try:
            if name == "give":
                process.give_back(argument)
            else:
                {"take": process.take, "undo": process.take_and_undo, "publish": process.publish}[name]()
        except EndedError:
            self.process = Process(self.pair, self.table, self.ends.pop(0), self.start)


def test_without_a_table_what_was_not_shown_is_taken_again():
    with queue_and_table() as (pair, _):
        for _ in range(5):
            pair.driver.add([Buffer(DATA, 16, True)])
        pair.driver.publish()
        queue = pair.queue
        for _ in range(3):
            chain = queue.pop()
            assert chain is not None
            queue.add_used(chain, 1)
        queue.publish()
        chain = queue.pop()
        assert chain is not None
        queue.add_used(chain, 1)  # never shown
        assert recover(pair.memory, queue.state(), None) == (3, 3, ())


def test_a_used_index_that_no_device_has_written_is_refused():
    with queue_and_table() as (pair, table):
        queue = TrackedQueue(pair.memory, FEATURES, pair.queue.state(), table)
        queue.used[1] = SIZE + 1
        with pytest.raises(QueueError, match="given back"):
            recover(pair.memory, pair.queue.state(), table)


def test_heads_that_no_device_has_written_are_left_alone():
    with queue_and_table() as (pair, table):
        queue = TrackedQueue(pair.memory, FEATURES, pair.queue.state(), table)
        queue.used_elements[0] = 1 << 31
        queue.used[1] = 1
        assert recover(pair.memory, pair.queue.state(), table) == (1, 1, ())


def test_a_table_that_is_too_small_is_refused():
    refused = pytest.raises(QueueError, match="larger than its table")
    with queue_and_table(4) as (_, table), queue_and_table(SIZE) as (pair, _), refused:
        recover(pair.memory, pair.queue.state(), table)


def test_a_chain_that_is_in_flight_cannot_be_made_available_again():
    with queue_and_table() as (pair, table):
        queue = TrackedQueue(pair.memory, FEATURES, pair.queue.state(), table)
        head = pair.driver.add([Buffer(DATA, 16, True)])
        pair.driver.publish()
        assert queue.pop() is not None
        queue.available[3], queue.available[1] = head, 2
        with pytest.raises(QueueError, match="in flight"):
            queue.pop()


def test_a_driver_that_names_no_descriptor_is_refused():
    with queue_and_table() as (pair, table):
        queue = TrackedQueue(pair.memory, FEATURES, pair.queue.state(), table)
        queue.available[2] = SIZE
        queue.available[1] = 1
        with pytest.raises(QueueError, match="descriptor 8"):
            queue.pop()


def test_the_region_has_room_for_every_queue():
    assert table_words(256) == 257
    assert region_size((256,) * 16) == 9 * 4096
