"""The maps against sets of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio.block.overlay.cluster_map import ClusterMap, runs_of
from virtio.block.overlay.layout import Geometry
from virtio.errors import OverlayError

#: More clusters than one sector of a map has bits, and no whole byte at the end.
CLUSTERS = 9013
GEOMETRY = Geometry(12, CLUSTERS << 12, bytes(16))
EMPTY = bytes(GEOMETRY.map_size)


def within(run):
    """Cut a run off at the last cluster."""
    return run[0], min(run[1], CLUSTERS - run[0])


RANGES = st.lists(st.tuples(st.integers(0, CLUSTERS - 1), st.integers(1, 5000)).map(within))


def add(map, first, count):
    """Have clusters mapped; return what the volatile map is told."""
    write = map.with_set(first, count)
    map.set(write)
    return write


@given(RANGES, st.lists(st.booleans()))
def test_maps_say_what_a_set_says(ranges, flushes):
    map = ClusterMap(GEOMETRY, EMPTY)
    volatile, durable = bytearray(EMPTY), bytearray(EMPTY)
    known: set[int] = set()
    for (first, count), flush in zip(ranges, [*flushes, *[False] * len(ranges)], strict=False):
        at, data = add(map, first, count)
        volatile[at : at + len(data)] = data
        known.update(range(first, first + count))
        assert map.bits(first, count) == (1 << count) - 1
        if flush:
            written = map.merge(map.pending())
            for at, data in written:
                assert at % 512 == 0
                assert len(data) == 512
                durable[at : at + len(data)] = data
            map.settle(written)
            assert not map.pending()
            assert durable == map.durable == map.mapped
            assert not map.pending_count
    assert map.count == len(known)
    assert volatile == map.mapped
    assert {n for first, count in map.runs(mapped=True) for n in range(first, first + count)} == known
    free = {n for first, count in map.runs(mapped=False) for n in range(first, first + count)}
    assert free == set(range(CLUSTERS)) - known
    again = ClusterMap(GEOMETRY, bytes(durable), bytes(volatile))
    assert again.mapped == map.mapped
    assert again.pending_count == map.pending_count
    assert [each[0] for each in again.pending()] == sorted(
        {at for at in range(0, len(durable), 512) if durable[at : at + 512] != volatile[at : at + 512]}
    )


def test_what_is_mapped_while_a_flush_is_under_way_waits_for_the_next_one():
    map = ClusterMap(GEOMETRY, EMPTY)
    add(map, 3, 1)
    pending = map.pending()
    add(map, 4, 1)
    add(map, 6000, 1)
    map.settle(map.merge(pending))
    assert map.durable[0] == 1 << 3
    assert [at for at, _ in map.pending()] == [0, 512]
    assert map.pending_count == 2


def test_a_map_that_is_told_less_than_it_says_loses_nothing():
    map = ClusterMap(GEOMETRY, EMPTY)
    add(map, 3, 1)
    early = map.pending()
    add(map, 4, 1)
    map.settle(map.merge(map.pending()))
    assert map.merge(early)[0][1][0] == 1 << 3 | 1 << 4


@given(st.integers(0, (1 << 70) - 1), st.integers(1, 70))
def test_runs_are_those_of_the_bits(bits, count):
    bits &= (1 << count) - 1
    found = runs_of(bits, count)
    assert [at for at, _, _ in found] == [sum(length for _, length, _ in found[:n]) for n in range(len(found))]
    assert sum(length for _, length, _ in found) == count
    assert all(one[2] != other[2] for one, other in pairwise(found))
    assert sum(((1 << length) - 1 << at) for at, length, is_set in found if is_set) == bits


@given(st.integers(0, len(EMPTY) * 8 - CLUSTERS - 1))
def test_bits_behind_the_last_cluster_are_damage(bit):
    damaged = bytearray(EMPTY)
    damaged[(CLUSTERS + bit) >> 3] |= 1 << (CLUSTERS + bit & 7)
    for maps in ((bytes(damaged),), (EMPTY, bytes(damaged))):
        with pytest.raises(OverlayError, match="are not there"):
            ClusterMap(GEOMETRY, *maps)
    for maps in ((EMPTY[:-1],), (EMPTY, EMPTY[:-1])):
        with pytest.raises(OverlayError, match="cut off"):
            ClusterMap(GEOMETRY, *maps)
