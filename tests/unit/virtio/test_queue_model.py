"""The queue against a model: whatever is offered comes out in order and unchanged, and comes back in any order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.virtqueues import DATA, FEATURES, HIGH, MIB, guest_memory, make_pair
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1
from virtio.driver import Buffer, Used
from virtio.errors import DriverError
from virtio.queue import restore_queue

_READABLE = st.builds(Buffer, st.sampled_from((DATA, HIGH)), st.integers(0, 9000), st.just(False))
_WRITABLE = st.builds(Buffer, st.sampled_from((DATA + 4096, HIGH + 77)), st.integers(0, 9000), st.just(True))
_CHAINS = st.tuples(st.lists(_READABLE, max_size=4), st.lists(_WRITABLE, max_size=4)).map(lambda two: two[0] + two[1])
_STEPS = st.one_of(
    st.tuples(st.just("add"), _CHAINS.filter(lambda chain: any(buffer.length for buffer in chain)), st.booleans()),
    st.tuples(st.sampled_from(("publish", "pop", "undo", "show", "take", "restart")), st.none(), st.none()),
    st.tuples(st.just("use"), st.integers(0, 7), st.integers(0, 5000)),
)


def offset(address: int) -> int:
    return address if address < HIGH else address - HIGH + MIB


def features_of(pair) -> int:
    return FEATURES if pair.driver.event_idx else FEATURES & ~VIRTIO_F_EVENT_IDX


class Model:
    """What both sides are to see."""

    def __init__(self, pair) -> None:
        self.pair = pair
        self.added: list[tuple[int, list[Buffer]]] = []  # not published
        self.available: list[tuple[int, list[Buffer]]] = []
        self.held: list = []  # chains that the device has taken
        self.used: list[Used] = []  # given back, not shown
        self.shown: list[Used] = []
        self.popped_last = False

    def step(self, kind, what, how) -> None:
        popped_last, self.popped_last = self.popped_last, False
        pair = self.pair
        if kind == "add":
            try:
                self.added.append((pair.driver.add(what, indirect=how), what))
            except DriverError:
                assert len(what) > pair.config.size or len(pair.driver._free) < (1 if how else len(what))
        elif kind == "publish":
            pair.driver.publish()
            self.available += self.added
            self.added = []
        elif kind == "pop":
            self.pop()
        elif kind == "undo" and popped_last:
            pair.queue.undo_pop()
            self.available.insert(0, self.held.pop()[1:])
        elif kind == "use" and self.held:
            chain, head, _ = self.held.pop(what % len(self.held))
            pair.queue.add_used(chain, how)
            self.used.append(Used(head, how))
        elif kind == "show":
            pair.queue.publish()
            self.shown += self.used
            self.used = []
        elif kind == "take":
            assert pair.driver.take_used() == self.shown
            for head, _ in self.shown:
                pair.driver.free(head)
            self.shown = []
        elif kind == "restart" and not self.used:
            self.pair = pair._replace(
                queue=restore_queue(pair.memory, features_of(pair), pair.queue.state(), pair.config.max_size)
            )

    def pop(self) -> None:
        chain = self.pair.queue.pop()
        assert self.pair.queue.waiting() == max(0, len(self.available) - 1)
        if not self.available:
            assert chain is None
            return
        head, buffers = self.available.pop(0)
        assert chain.head == head
        for found, writable in ((chain.readable, False), (chain.writable, True)):
            assert found == [(offset(a), n) for a, n, w in buffers if n and w is writable]
        self.held.append((chain, head, buffers))
        self.popped_last = True


@settings(max_examples=200)
@given(st.lists(_STEPS, max_size=60), st.sampled_from((1, 2, 8, 16)), st.booleans())
def test_any_order_of_steps(steps, size, event_idx):
    features = FEATURES if event_idx else FEATURES & ~VIRTIO_F_EVENT_IDX
    assert features & VIRTIO_F_VERSION_1
    with guest_memory() as memory:
        model = Model(make_pair(memory, size, features))
        for each in steps:
            model.step(*each)
