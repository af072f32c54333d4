"""The C extension: what it serves itself and what it hands back; what it refuses to be made of."""

from __future__ import annotations

import gc

import pytest

from base import native_loops
from ipc.guest_memory import GuestMemory
from tests.harness.drives import BUFFER, HEADER, STATUS, drive, extension, pattern
from tests.harness.virtqueues import DATA, HIGH, MIB, RINGS, guest_memory, make_pair
from virtio import abi
from virtio.block.device import Block
from virtio.driver import Buffer


@pytest.fixture
def counted(monkeypatch):
    """Heads that were handed back."""
    heads: list[int] = []
    serve_head = Block.serve_head

    def count(self, queue, number, head):
        heads.append(head)
        serve_head(self, queue, number, head)

    monkeypatch.setattr(Block, "serve_head", count)
    return heads


def test_the_common_request_never_comes_back_to_python(counted):
    with drive("extension") as made:
        assert made.read(3) == pattern()[3 << 9 : 4 << 9]
        assert made.write(7, b"w" * 1024) == abi.VIRTIO_BLK_S_OK
        pieces = [Buffer(HIGH + 0x400 * number, 512, True) for number in range(60)]
        assert made.ask(abi.VIRTIO_BLK_T_IN, 0, pieces) == abi.VIRTIO_BLK_S_OK
        assert not counted
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == abi.VIRTIO_BLK_S_OK
        assert made.read(3, indirect=False) == pattern()[3 << 9 : 4 << 9]
        assert len(counted) == 2
        values = made.device.collect().values
        assert (values["read_count"], values["read_bytes"]) == (3, 512 + 60 * 512 + 512)
        assert (values["write_count"], values["write_bytes"]) == (1, 1024)
        assert made.device.counters.aggregates["read_agg"].count == 3
        assert made.device.collect().values["read_count"] == 3, "counted once"


def test_a_batch_of_both(counted):
    """Requests that it does not know, between those that it does: in order, one decision about the interrupt."""
    with drive("extension") as made:
        for number in range(16):
            kind = abi.VIRTIO_BLK_T_FLUSH if number % 3 == 1 else abi.VIRTIO_BLK_T_IN
            made.memory.write(HEADER + 0x20 * number, abi.VIRTIO_BLK_REQ.pack(kind, 0, number))
            data = [Buffer(HIGH + 512 * number, 512, True)] if kind == abi.VIRTIO_BLK_T_IN else []
            status = Buffer(STATUS + 0x1000 + number, 1, True)
            made.driver.add([Buffer(HEADER + 0x20 * number, 16), *data, status], indirect=True)
        made.memory.write(STATUS + 0x1000, b"\xee" * 16)
        before = made.notify.used_count
        made.driver.arm()
        assert [used.written for used in made.settle()] == [1 if number % 3 == 1 else 513 for number in range(16)]
        assert made.memory.read(STATUS + 0x1000, 16) == bytes(16)
        assert made.notify.used_count == before + 1
        assert len(counted) == 5


def test_what_is_written_is_marked_while_that_is_tracked():
    with drive("extension") as made:
        made.memory.track_dirty(True)
        made.read(0)
        dirty = made.memory.take_dirty()
        page = (MIB + BUFFER - HIGH) >> 12
        assert dirty[page >> 3] & 1 << (page & 7)
        assert made.device.collect().values["read_count"] == 1


def test_more_chains_than_the_queue_holds_are_the_end():
    with drive("extension") as made:
        made.driver.available[1] = 0x8000
        made.device.notified(0)
        assert len(made.notify.resets) == 1
        assert "in a queue of that size" in made.notify.resets[0]


def test_too_many_regions_are_python_s(monkeypatch):
    with drive("extension") as made:
        made.stop()
        low, high = made.memory.spans
        made.memory.spans = (low, *[high] * 20)
        made.activate()
        assert not made.device._takes
        assert made.read(1) == pattern()[512:1024]


def test_what_a_loop_is_not_made_of():
    with extension(True), guest_memory() as memory:
        loops = native_loops.loops()
        assert loops is not None
        pair = make_pair(memory, 16)
        state = pair.queue.state()
        good = [
            memory.view[:], memory.spans, pair.queue, state.descriptor_table, state.available_ring, state.used_ring, 16,
            True, True, 0, 64, False,
        ]  # fmt: skip
        assert loops.BlockLoop(*good).arm() is False
        for place, wrong in (
            (1, ((0, 3 * MIB, 0),)),
            (1, ((0, MIB, -1),)),
            (1, ((MIB, 0, 0),)),
            (1, ()),
            (1, ((0, MIB),)),
            (1, ((0, MIB, 0),) * 17),
            (3, state.descriptor_table + 8),
            (3, MIB - 16),
            (4, state.available_ring + 1),
            (5, state.used_ring + 2),
            (5, 1 << 63),
            (6, 0),
            (6, 3),
            (6, 1 << 16),
            (0, bytes(2 * MIB)),
            (2, object()),
            (2, 7),
        ):
            with pytest.raises((ValueError, TypeError, AttributeError, BufferError)):
                loops.BlockLoop(*good[:place], wrong, *good[place + 1 :])
        loop = loops.BlockLoop(*good)
        with pytest.raises(TypeError):
            loop.__init__(*good)
        with pytest.raises(TypeError):
            loop.serve("x")
        empty = loops.BlockLoop.__new__(loops.BlockLoop)
        for call in (lambda: empty.serve(1), empty.go_on, empty.arm):
            with pytest.raises(ValueError, match="not set up"):
                call()
        assert loop.serve(0) == 0
        assert RINGS < DATA


def test_guest_memory_closes_though_a_loop_was_made_of_it():
    with extension(True), guest_memory() as memory:
        loops = native_loops.loops()
        assert loops is not None
        pair = make_pair(memory, 16)
        state = pair.queue.state()
        loop = loops.BlockLoop(
            memory.view[:], memory.spans, pair.queue, state.descriptor_table, state.available_ring, state.used_ring, 16,
            True, True, 0, 64, False,
        )  # fmt: skip
        memory.close()
        assert isinstance(memory, GuestMemory)
        assert loop.arm() is False, "the mapping lives as long as somebody looks at it"
        del loop, pair
        gc.collect()
