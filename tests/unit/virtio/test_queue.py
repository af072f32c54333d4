"""The device's side of a virtqueue: chains, batches, decisions, state, dirty marks, and what is refused."""

from __future__ import annotations

import struct

import pytest

from ipc.guest_memory import PAGE_SIZE, GuestMemory
from tests.harness.virtqueues import DATA, FEATURES, HIGH, MIB, RINGS, TABLES, guest_memory, make_pair
from virtio.abi import (
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
)
from virtio.driver import Buffer, Used, lay_out
from virtio.errors import QueueError
from virtio.queue import QUEUE_STATE, Chain, Queue, QueueConfig, QueueState, restore_queue

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT


@pytest.fixture
def memory():
    with guest_memory() as made:
        yield made


@pytest.fixture
def pair(memory):
    return make_pair(memory)


def taken(queue: Queue) -> Chain:
    """Take a chain that is there."""
    chain = queue.pop()
    assert chain is not None
    return chain


def descriptor(pair, index, address, length, flags=0, following=0, *, table=None):  # noqa: PLR0917
    """Write a descriptor as a hostile driver may."""
    place = (pair.config.descriptor_table if table is None else table) + 16 * index
    pair.memory.write(place, struct.pack("<QIHH", address, length, flags, following))


def offer(pair, head):
    """Make a head available, whatever it is."""
    driver = pair.driver
    driver.available[2 + (driver.next_available & driver.size - 1)] = head
    driver.next_available = driver.next_available + 1 & 0xFFFF
    driver.publish()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_comes_out_as_it_was_put_in(pair, indirect):
    head = pair.driver.add(
        [Buffer(DATA, 16), Buffer(HIGH + 5, 7), Buffer(DATA + 100, 512, True), Buffer(DATA, 1, True)], indirect=indirect
    )
    assert pair.queue.pop() is None  # not published yet
    pair.driver.publish()
    chain = taken(pair.queue)
    assert chain.head == head
    assert chain.readable == [(DATA, 16), (MIB + 5, 7)]
    assert chain.writable == [(DATA + 100, 512), (DATA, 1)]
    assert pair.queue.pop() is None
    pair.queue.add_used(chain, 513)
    assert pair.driver.take_used() == []
    assert pair.queue.publish()
    assert pair.driver.take_used() == [Used(head, 513)]


def test_an_indirect_table_may_end_a_chain(pair):
    descriptor(pair, 3, DATA, 16, NEXT, 9)
    descriptor(pair, 9, TABLES, 32, INDIRECT | WRITE)  # the flag WRITE of a table means nothing
    descriptor(pair, 0, DATA + 64, 8, NEXT, 1, table=TABLES)
    descriptor(pair, 1, DATA + 128, 4, WRITE, 7, table=TABLES)
    offer(pair, 3)
    chain = taken(pair.queue)
    assert (chain.readable, chain.writable) == ([(DATA, 16), (DATA + 64, 8)], [(DATA + 128, 4)])


def test_an_indirect_table_need_not_be_in_order(pair):
    descriptor(pair, 0, TABLES, 4 * 16, INDIRECT)
    descriptor(pair, 0, DATA, 1, NEXT, 3, table=TABLES)
    descriptor(pair, 1, DATA + 3, 3, WRITE, 0, table=TABLES)
    descriptor(pair, 2, DATA + 9, 9, NEXT, 2, table=TABLES)  # not of the chain
    descriptor(pair, 3, DATA + 2, 2, NEXT, 1, table=TABLES)
    offer(pair, 0)
    chain = taken(pair.queue)
    assert (chain.readable, chain.writable) == ([(DATA, 1), (DATA + 2, 2)], [(DATA + 3, 3)])


def test_empty_buffers_are_left_out_wherever_they_are(pair):
    pair.driver.add([Buffer(1 << 60, 0), Buffer(DATA, 4), Buffer(0, 0, True), Buffer(DATA, 4, True)])
    pair.driver.publish()
    chain = taken(pair.queue)
    assert (chain.readable, chain.writable) == ([(DATA, 4)], [(DATA, 4)])


def test_a_chain_may_be_as_long_as_the_queue(pair):
    for indirect in (False, True):
        head = pair.driver.add([Buffer(DATA + k, 1) for k in range(16)], indirect=indirect)
        pair.driver.publish()
        chain = taken(pair.queue)
        assert chain.readable == [(DATA + k, 1) for k in range(16)]
        pair.queue.add_used(chain, 0)
        pair.queue.publish()
        assert pair.driver.take_used() == [Used(head, 0)]
        pair.driver.free(head)


BROKEN = {
    "no such head": lambda p: offer(p, 16),
    "no such next": lambda p: (descriptor(p, 0, DATA, 4, NEXT, 16), offer(p, 0)),
    "a loop": lambda p: (descriptor(p, 0, DATA, 4, NEXT, 1), descriptor(p, 1, DATA, 4, NEXT, 0), offer(p, 0)),
    "leads to itself": lambda p: (descriptor(p, 0, DATA, 4, NEXT, 0), offer(p, 0)),
    "readable after writable": lambda p: (
        descriptor(p, 0, DATA, 4, NEXT | WRITE, 1), descriptor(p, 1, DATA, 4), offer(p, 0)),
    "nothing in it": lambda p: (descriptor(p, 0, DATA, 0), offer(p, 0)),
    "not RAM": lambda p: (descriptor(p, 0, 3 << 30, 4), offer(p, 0)),
    "the end of a region": lambda p: (descriptor(p, 0, MIB - 2, 4), offer(p, 0)),
    "the end of all": lambda p: (descriptor(p, 0, (1 << 64) - 4, 16), offer(p, 0)),
    "all of memory, twice": lambda p: (descriptor(p, 0, 0, (1 << 32) - 1), offer(p, 0)),
    "a table of nothing": lambda p: (descriptor(p, 0, TABLES, 0, INDIRECT), offer(p, 0)),
    "a table and a half": lambda p: (descriptor(p, 0, TABLES, 24, INDIRECT), offer(p, 0)),
    "a table with a next": lambda p: (descriptor(p, 0, TABLES, 16, INDIRECT | NEXT, 1), offer(p, 0)),
    "a table longer than the queue": lambda p: (descriptor(p, 0, TABLES, 17 * 16, INDIRECT), offer(p, 0)),
    "a table outside memory": lambda p: (descriptor(p, 0, MIB - 16, 32, INDIRECT), offer(p, 0)),
    "a table in a table": lambda p: (
        descriptor(p, 0, TABLES, 16, INDIRECT), descriptor(p, 0, TABLES, 16, INDIRECT, table=TABLES), offer(p, 0)),
    "a table in a table, out of order": lambda p: (
        descriptor(p, 0, TABLES, 48, INDIRECT), descriptor(p, 0, DATA, 1, NEXT, 2, table=TABLES),
        descriptor(p, 2, TABLES, 16, INDIRECT, table=TABLES), offer(p, 0)),
    "a table that loops": lambda p: (
        descriptor(p, 0, TABLES, 16, INDIRECT), descriptor(p, 0, DATA, 1, NEXT, 0, table=TABLES), offer(p, 0)),
    "a table that leads out of itself": lambda p: (
        descriptor(p, 0, TABLES, 16, INDIRECT), descriptor(p, 0, DATA, 1, NEXT, 1, table=TABLES), offer(p, 0)),
    "a long table after a chain": lambda p: (
        descriptor(p, 0, DATA, 1, NEXT, 1), descriptor(p, 1, TABLES, 16 * 16, INDIRECT),
        [descriptor(p, k, DATA, 1, NEXT, k + 1, table=TABLES) for k in range(15)],
        descriptor(p, 15, DATA, 1, 0, table=TABLES), offer(p, 0)),
    "too many chains": lambda p: p.driver.available.__setitem__(1, 17),
    "an index that went back": lambda p: p.driver.available.__setitem__(1, 0xFFFF),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_rules_is_refused(pair, name):
    BROKEN[name](pair)
    with pytest.raises(QueueError):
        pair.queue.pop()


def test_more_bytes_than_a_chain_may_have_are_refused(memory):
    pair = make_pair(memory, 256)
    for index in range(2):
        descriptor(pair, index, 0, MIB, NEXT, index + 1)
    descriptor(pair, 2, 0, MIB)
    offer(pair, 0)
    assert len(taken(pair.queue).readable) == 3  # buffers may overlap; the bound on their sum stands in the next test


def test_the_sum_of_a_chain_is_bounded(memory, monkeypatch):
    monkeypatch.setattr("virtio.queue.MAX_CHAIN_BYTES", 1000)
    pair = make_pair(memory)
    pair.driver.add([Buffer(DATA, 500), Buffer(DATA, 500)])
    pair.driver.add([Buffer(DATA, 500), Buffer(DATA, 501)])
    pair.driver.publish()
    assert taken(pair.queue).readable == [(DATA, 500), (DATA, 500)]
    with pytest.raises(QueueError):
        pair.queue.pop()


def test_tables_are_refused_if_they_were_not_negotiated(memory):
    pair = make_pair(memory, features=FEATURES & ~VIRTIO_F_INDIRECT_DESC)
    pair.driver.add([Buffer(DATA, 4)], indirect=True)
    pair.driver.publish()
    with pytest.raises(QueueError):
        pair.queue.pop()


@pytest.mark.parametrize("size", [1, 2, 16])
def test_indices_wrap_around(memory, size):
    pair = make_pair(memory, size)
    head = pair.driver.write_chain([Buffer(DATA, 8)])
    armed = 0
    for count in range(0x10000 + 5):
        if count % 7 == 0:
            assert not pair.queue.arm()
            armed = count
        pair.driver.offer(head)
        pair.driver.arm()
        assert pair.driver.publish() == (armed == count)
        chain = taken(pair.queue)
        pair.queue.add_used(chain, count & 0xFF)
        assert pair.queue.publish()
        assert pair.driver.take_used() == [Used(head, count & 0xFF)]


def test_one_decision_for_a_batch(pair):
    heads = [pair.driver.add([Buffer(DATA, 8)]) for _ in range(6)]
    pair.driver.publish()
    assert not pair.driver.arm()
    for batch, asked in ((3, True), (3, False)):
        for _ in range(batch):
            pair.queue.add_used(taken(pair.queue), 0)
        assert pair.queue.publish() is asked
        assert not pair.queue.publish()  # nothing new
    assert [used.head for used in pair.driver.take_used()] == heads
    assert not pair.driver.arm()


def test_an_interrupt_is_asked_for_by_number(pair):
    for _ in range(6):
        pair.driver.add([Buffer(DATA, 8)])
    pair.driver.publish()
    pair.driver.available[2 + 16] = 4  # used_event: with the fifth
    decisions = []
    for _ in range(6):
        pair.queue.add_used(taken(pair.queue), 0)
        decisions.append(pair.queue.publish())
    assert decisions == [False, False, False, False, True, False]


def test_without_event_idx_flags_decide(memory):
    pair = make_pair(memory, features=VIRTIO_F_VERSION_1)
    for flags, wanted in ((0, True), (VIRTQ_AVAIL_F_NO_INTERRUPT, False), (0, True)):
        if flags:
            pair.driver.disarm()
        else:
            pair.driver.arm()
        head = pair.driver.add([Buffer(DATA, 8)])
        assert pair.driver.publish()  # the device never says that it wants no kick
        assert pair.queue.arm()
        pair.queue.add_used(taken(pair.queue), 0)
        assert pair.queue.publish() is wanted
        assert not pair.queue.arm()
        pair.driver.take_used()
        pair.driver.free(head)


def test_a_kick_is_asked_for_by_arm_only(pair):
    assert not pair.queue.arm()
    pair.driver.add([Buffer(DATA, 8)])
    assert pair.driver.publish()
    pair.driver.add([Buffer(DATA, 8)])
    assert not pair.driver.publish()
    pair.queue.pop()
    assert pair.queue.arm()  # one is there already
    pair.queue.pop()
    assert not pair.queue.arm()
    pair.driver.add([Buffer(DATA, 8)])
    assert pair.driver.publish()


def test_a_chain_that_was_not_begun_comes_again(pair):
    heads = [pair.driver.add([Buffer(DATA, 8)]) for _ in range(2)]
    pair.driver.publish()
    assert pair.queue.waiting() == 2
    assert taken(pair.queue).head == heads[0]
    pair.queue.undo_pop()
    assert pair.queue.waiting() == 2
    assert [taken(pair.queue).head for _ in range(2)] == heads
    assert pair.queue.waiting() == 0


def test_a_queue_goes_on_from_its_state(pair, memory):
    heads = [pair.driver.add([Buffer(DATA, 8)]) for _ in range(4)]
    pair.driver.publish()
    pair.queue.add_used(taken(pair.queue), 1)
    pair.queue.publish()
    state = pair.queue.state()
    assert QUEUE_STATE.check(tuple(state), "queue") == state
    assert (state.next_available, state.next_used) == (1, 1)
    again = restore_queue(memory, FEATURES, state, 16)
    assert again.state() == state
    assert taken(again).head == heads[1]
    for _ in range(2):
        again.pop()
    for head in heads[1:]:
        again.add_used(again.chain(head), 2)
    again.publish()
    assert pair.driver.take_used() == [Used(heads[0], 1), *(Used(head, 2) for head in heads[1:])]


def test_only_what_was_written_is_marked(pair, memory):
    pair.driver.add([Buffer(DATA, 8), Buffer(HIGH + 3 * PAGE_SIZE + 4000, 200, True)])
    pair.driver.publish()
    memory.track_dirty(True)
    pair.queue.add_used(taken(pair.queue), 200)
    pair.queue.publish()
    marked = int.from_bytes(memory.take_dirty(), "little")
    pages = {number for number in range(memory.size // PAGE_SIZE) if marked >> number & 1}
    used = pair.config.used_ring // PAGE_SIZE
    assert pages == {used, (MIB // PAGE_SIZE) + 3, (MIB // PAGE_SIZE) + 4}


def config_of(size=16, max_size=16, **places):
    config = QueueConfig(max_size)
    config.size = size
    lay_out(config, RINGS)
    for name, value in places.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "config",
    [
        config_of(size=0), config_of(size=3), config_of(size=32), config_of(size=-16),
        config_of(size=1 << 16, max_size=1 << 16),
        config_of(descriptor_table=8), config_of(available_ring=1), config_of(used_ring=2),
        config_of(descriptor_table=MIB - 16), config_of(available_ring=MIB - 2), config_of(used_ring=3 << 30),
        config_of(used_ring=MIB - 130), config_of(descriptor_table=(1 << 64) - 16), config_of(descriptor_table=-16),
    ],
)  # fmt: skip
def test_a_queue_that_was_set_up_wrongly_is_refused(memory, config):
    with pytest.raises(QueueError):
        config.ready(memory, FEATURES)


@pytest.mark.parametrize(
    "changes", [{"size": 3}, {"used_ring": 2}, {"available_ring": MIB}, {"next_available": 18}, {"next_used": 2}]
)
def test_a_state_that_cannot_be_is_refused(pair, memory, changes):
    state = QueueState(*pair.queue.state())._replace(next_available=1, next_used=1)
    restore_queue(memory, FEATURES, state, 16)
    with pytest.raises(QueueError):
        restore_queue(memory, FEATURES, state._replace(**changes), 16)


def test_regions_that_go_are_no_buffers_any_more(pair, memory: GuestMemory):
    pair.driver.add([Buffer(HIGH, 8)])
    pair.driver.add([Buffer(HIGH, 8)])
    pair.driver.publish()
    assert taken(pair.queue).readable == [(MIB, 8)]
    memory.set_regions(memory.regions[:1])
    with pytest.raises(QueueError):
        pair.queue.pop()
