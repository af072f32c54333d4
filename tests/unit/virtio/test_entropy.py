"""The entropy device: buffers are filled, requests bounded, the limiter obeyed, hostile drivers told to reset."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.event_loop import run_until
from tests.harness.virtio_devices import bench
from tests.harness.virtqueues import DATA, HIGH
from tests.metrics_table import EXPECTED
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from virtio.driver import Buffer, Used
from virtio.entropy import BUDGET, MAX_REQUEST, Entropy
from virtio.rate_limiter import Bucket, RateLimiter


def test_what_it_offers_and_counts():
    device = Entropy("rng")
    assert device.kind == 4
    assert device.features() == VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC
    assert device.config() == b""
    device.write_config(0, b"x")
    assert set(device.counters.values) == EXPECTED["entropy"]


def test_a_request_is_filled():
    with bench(Entropy("rng")) as made:
        made.memory.write(DATA, bytes(200))
        used = made.request([Buffer(DATA, 64, True), Buffer(HIGH, 100, True)])
        assert used.written == 164
        first, second = made.memory.read(DATA, 64), made.memory.read(HIGH, 100)
        assert len(set(first)) > 20 and len(set(second)) > 20
        assert made.memory.read(DATA + 64, 64) == bytes(64)
        assert made.device.counters.values["entropy_bytes"] == 164
        assert made.notify.used_count == 1
        again = made.request([Buffer(DATA, 64, True)], indirect=True)
        assert again.written == 64
        assert made.memory.read(DATA, 64) != first


def test_a_request_gets_64_kib_at_most():
    with bench(Entropy("rng")) as made:
        made.memory.write(HIGH, bytes(3 * MAX_REQUEST))
        assert made.request([Buffer(HIGH, 1, True), Buffer(HIGH + 1, 3 * MAX_REQUEST, True)]).written == MAX_REQUEST
        assert made.memory.read(HIGH + MAX_REQUEST, 2 * MAX_REQUEST) == bytes(2 * MAX_REQUEST)


def test_a_chain_with_readable_buffers_gets_nothing():
    with bench(Entropy("rng")) as made:
        assert made.request([Buffer(DATA, 8), Buffer(DATA, 8, True)]).written == 0
        assert made.request([Buffer(DATA, 8)]).written == 0
        assert made.device.counters.values["entropy_event_fails"] == 2
        assert not made.notify.resets


def test_a_host_without_entropy_gives_nothing(monkeypatch):
    def refuse(size, flags):
        assert flags == os.GRND_NONBLOCK
        raise BlockingIOError

    monkeypatch.setattr("os.getrandom", refuse)
    with bench(Entropy("rng")) as made:
        assert made.request([Buffer(DATA, 8, True)]).written == 0
        assert made.device.counters.values["host_rng_fails"] == 1


def test_work_of_a_turn_is_bounded():
    with bench(Entropy("rng")) as made:
        heads = [made.driver.add([Buffer(DATA, 16, True)]) for _ in range(3 * BUDGET)]
        made.kick()
        assert len(made.driver.take_used()) == BUDGET
        made.events.run(0)
        assert len(made.driver.take_used()) == BUDGET
        assert [used.head for used in made.settle()] == heads[2 * BUDGET :]


def test_the_limiter_holds_requests_back_and_lets_them_go():
    device = Entropy("rng", RateLimiter(Bucket(1000, 10)))
    with bench(device) as made:
        heads = [made.driver.add([Buffer(DATA, 1000, True)]) for _ in range(3)]
        made.kick()
        assert made.driver.take_used() == [Used(heads[0], 1000)]
        made.device.notified(0)  # it does not even look
        assert made.driver.take_used() == []
        assert made.settle() == [Used(head, 1000) for head in heads[1:]]
        assert device.counters.values["entropy_rate_limiter_throttled"] == 2
        assert device.counters.values["rate_limiter_event_count"] == 2


def test_stopped_while_it_waits_it_goes_on_with_the_next_activation():
    device = Entropy("rng", RateLimiter(Bucket(1000, 20)))
    with bench(device) as made:
        for _ in range(3):
            made.driver.add([Buffer(DATA, 1000, True)])
        made.kick()
        made.stop()
        made.driver.take_used()
        assert made.events.run(40) == 0  # no timer, no call
        made.activate()
        run_until(made.events, lambda: made.queues[0].next_used == 3)


def test_a_driver_that_breaks_the_rules_is_told_once_to_reset():
    with bench(Entropy("rng")) as made:
        made.driver.available[1] = 300
        for _ in range(3):
            made.device.notified(0)
        assert len(made.notify.resets) == 1
        made.stop()
        made.device.reset()
        made.driver.available[1] = 0
        made.activate()
        assert made.request([Buffer(DATA, 8, True)]).written == 8
        assert len(made.notify.resets) == 1


@settings(max_examples=100)
@given(st.lists(st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=4), max_size=20))
def test_any_requests_come_back_with_what_they_may_have(chains):
    with bench(Entropy("rng"), size=64) as made:
        for chain in chains:
            readable = [Buffer(DATA, length) for length, writable in chain if not writable]
            writable = [Buffer(HIGH, length, True) for length, writable in chain if writable]
            if not any(buffer.length for buffer in readable + writable):
                continue
            total = sum(buffer.length for buffer in writable)
            expected = 0 if any(buffer.length for buffer in readable) else total
            assert made.request(readable + writable).written == expected
        assert not made.notify.resets
