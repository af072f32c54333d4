"""What loops count: nothing is lost between two looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from virtio.block.tally import Tally


@given(st.lists(st.tuples(st.integers(1, 256), st.integers(0, 1 << 20), st.integers(0, 10**9)), max_size=20), st.data())
def test_sums(batches, data):
    tally = Tally()
    count = size = total = 0
    for batch in batches:
        tally.add(*batch)
        if data.draw(st.booleans()):
            taken = tally.take()
            assert taken[2].minimum <= taken[2].maximum
            count, size, total = count + taken[0], size + taken[1], total + taken[2].total
            assert taken[2].count == taken[0]
    taken = tally.take()
    assert count + taken[0] == sum(batch[0] for batch in batches)
    assert size + taken[1] == sum(batch[1] for batch in batches)
    assert total + taken[2].total == sum(batch[2] for batch in batches) // 1000
    again = tally.take()
    assert again[:2] == (0, 0) and again[2].count == again[2].total == 0


def test_least_and_most_are_means_of_batches():
    tally = Tally()
    tally.add(4, 0, 40_000)
    tally.add(1, 0, 25_999)
    taken = tally.take()[2]
    assert (taken.minimum, taken.maximum, taken.total) == (10, 25, 65)
