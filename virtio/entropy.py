"""The entropy device: random bytes of the host's kernel (virtio 1.2, 5.4; getrandom(2))."""

from __future__ import annotations

import os

from base.counters import Counters
from base.event_manager import EventOps
from base.lean_typing import NamedTuple
from ipc.guest_memory import GuestMemory
from ipc.schema import Maybe, RecordOf, Section
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VIRTIO_ID_ENTROPY
from virtio.device import VirtioDevice
from virtio.queue import Chain
from virtio.rate_limiter import BUCKET, RATE_LIMITER_STATE, Bucket, RateLimiter, RateLimiterState

QUEUE_SIZE = 256
#: A longer request gets so many bytes: what is asked for at once must not hold the loop up.
MAX_REQUEST = 64 << 10
#: Chains served in a turn.
BUDGET = 16
#: docs/formats/metrics.md
COUNTERS = (
    "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails "
    "entropy_rate_limiter_throttled rate_limiter_event_count"
)


#: What is offered.
FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC


class EntropySettings(NamedTuple):
    """How an entropy device is configured; None: no limit."""

    bandwidth: Bucket | None
    ops: Bucket | None


ENTROPY_SETTINGS = RecordOf(EntropySettings, bandwidth=Maybe(BUCKET), ops=Maybe(BUCKET))


class EntropyState(NamedTuple):
    """What an entropy device has beside its queue."""

    limiter: RateLimiterState


class Entropy(VirtioDevice):
    """One queue; each chain's writable buffers are filled."""

    kind = VIRTIO_ID_ENTROPY
    SECTION = Section("virtio-entropy", 1, RecordOf(EntropyState, limiter=RATE_LIMITER_STATE))

    def __init__(self, id: str, limiter: RateLimiter | None = None, state: EntropyState | None = None) -> None:
        super().__init__(id, (QUEUE_SIZE,), Counters(COUNTERS))
        self.limiter = RateLimiter(state=state.limiter) if state else limiter or RateLimiter()

    def init(self, ops: EventOps) -> None:
        """Use the loop's timers."""
        super().init(ops)
        self.limiter.attach(ops, self._room)

    def features(self) -> int:
        """Return what is offered."""
        return FEATURES

    def stop(self) -> None:
        """Nothing is ever in flight."""
        self.limiter.stop()
        self.activation = None

    def save(self) -> EntropyState:
        """Return what the constructor makes the device of."""
        return EntropyState(self.limiter.save())

    def update_limiter(self, bandwidth: Bucket | None, ops: Bucket | None) -> None:
        """Replace the limiter's buckets; None leaves one as it is."""
        self.limiter.update(bandwidth, ops)

    def serve(self, queue: int) -> None:
        """Fill what waits, at most :data:`BUDGET` chains in a turn. Raises VirtioError."""
        assert self.activation is not None
        memory, (ring,), _, notify = self.activation
        assert ring is not None
        self.counters.add("entropy_event_count")
        left = BUDGET
        while not self.limiter.is_blocked:
            chain = ring.pop()
            if chain is None:
                if ring.arm():
                    continue
                break
            size = min(sum([length for _, length in chain.writable]), MAX_REQUEST)
            if not self.limiter.take(1, size):
                ring.undo_pop()
                self.counters.add("entropy_rate_limiter_throttled")
                break
            ring.add_used(chain, self._fill(memory, chain, size))
            left -= 1
            if not left:
                assert self.loop is not None
                self.loop.soon(self._go_on)
                break
        if ring.publish():
            notify.used(0)

    def _fill(self, memory: GuestMemory, chain: Chain, size: int) -> int:
        """Return how many bytes were written."""
        if not size or chain.readable:
            self.counters.add("entropy_event_fails")
            return 0
        try:
            data = os.getrandom(size, os.GRND_NONBLOCK)
            while len(data) < size:  # a pending signal ends a long call early: getrandom(2)
                data += os.getrandom(size - len(data), os.GRND_NONBLOCK)
        except OSError:  # the host has no entropy yet
            self.counters.add("host_rng_fails")
            return 0
        done = 0
        for offset, length in chain.writable:
            part = data[done : done + length]
            memory.view[offset : offset + len(part)] = part
            done += len(part)
        self.counters.add("entropy_bytes", done)
        return done

    def _room(self) -> None:
        self.counters.add("rate_limiter_event_count")
        self.notified(0)

    def _go_on(self) -> None:
        self.notified(0)
