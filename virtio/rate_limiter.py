"""A device's rate limiter: a token bucket for bytes, one for operations, and a call when there is room again."""

from __future__ import annotations

import time

from base.event_manager import EventOps, Timer
from base.lean_typing import Callable, NamedTuple
from base.token_bucket import TokenBucket, TokenBucketState, restored_bucket
from ipc.schema import U64, Int, RecordOf


class Bucket(NamedTuple):
    """``size`` tokens that refill in ``refill_time`` ms, and a burst, used first and never refilled; 0: no limit."""

    size: int
    refill_time: int
    one_time_burst: int = 0


BUCKET = RecordOf(Bucket, size=Int(U64), refill_time=Int(U64), one_time_burst=Int(U64))


class RateLimiterState(NamedTuple):
    """Both buckets; one that limits nothing has the size 0."""

    bandwidth: TokenBucketState
    ops: TokenBucketState


_BUCKET_STATE = RecordOf(
    TokenBucketState,
    size=Int(U64),
    refill_time=Int(U64),
    one_time_burst=Int(U64),
    budget=Int(U64, -(1 << 63)),
    elapsed_ns=Int(U64),
)
RATE_LIMITER_STATE = RecordOf(RateLimiterState, bandwidth=_BUCKET_STATE, ops=_BUCKET_STATE)
_NO_LIMIT = Bucket(0, 0)


class RateLimiter:
    """Takes tokens for operations of a device; None for a bucket, or one of size 0, limits nothing.

    While it has said no and its timer runs, the device does not look at its queue. ``on_room`` is what it calls then,
    from the loop of ``attach``.
    """

    def __init__(
        self,
        bandwidth: Bucket | None = None,
        ops: Bucket | None = None,
        state: RateLimiterState | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._now_ns = now_ns
        if state is None:
            self._bandwidth = TokenBucket(*(bandwidth or _NO_LIMIT), now_ns)
            self._ops = TokenBucket(*(ops or _NO_LIMIT), now_ns)
        else:
            self._bandwidth = restored_bucket(state.bandwidth, now_ns)
            self._ops = restored_bucket(state.ops, now_ns)
        self._loop: EventOps | None = None
        self._timer: Timer | None = None
        self.on_room: Callable[[], None] = _nothing
        #: How often a take was refused, and how often there was room afterwards.
        self.throttled_count = 0
        self.event_count = 0

    @property
    def limits(self) -> bool:
        """Whether it limits anything."""
        return self._bandwidth.limits or self._ops.limits

    @property
    def is_blocked(self) -> bool:
        """Whether it has refused something and ``on_room`` is still to be called."""
        return self._timer is not None

    def attach(self, loop: EventOps, on_room: Callable[[], None]) -> None:
        """Use the timers of a loop."""
        self._loop = loop
        self.on_room = on_room

    def take(self, operations: int, size: int) -> bool:
        """Take tokens for so many operations and bytes: both, or none and False; then ``on_room`` will be called."""
        if self._timer is not None:
            return False
        if self._ops.fits(operations) and self._bandwidth.fits(size):
            self._ops.spend(operations)
            self._bandwidth.spend(size)
            return True
        self.throttled_count += 1
        wait = max(self._ops.room_ns(operations), self._bandwidth.room_ns(size))
        assert self._loop is not None
        self._timer = self._loop.add_timer(self._now_ns() + wait, self._room)
        return False

    def _room(self) -> None:
        self._timer = None
        self.event_count += 1
        self.on_room()

    def update(self, bandwidth: Bucket | None, ops: Bucket | None) -> None:
        """Replace buckets, full and with their burst; None leaves one as it is. Who was refused may try again."""
        if bandwidth is not None:
            self._bandwidth = TokenBucket(*bandwidth, self._now_ns)
        if ops is not None:
            self._ops = TokenBucket(*ops, self._now_ns)
        if self._timer is not None:
            assert self._loop is not None
            self._timer.cancel()
            self._timer = self._loop.add_timer(self._now_ns(), self._room)

    def stop(self) -> None:
        """Call nobody any more. What was refused is asked for again when the device goes on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def save(self) -> RateLimiterState:
        """Return what the constructor makes the limiter of."""
        return RateLimiterState(self._bandwidth.save(), self._ops.save())


def _nothing() -> None:
    """Nobody waits for room."""
