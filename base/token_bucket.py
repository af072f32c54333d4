"""A token bucket: a rate that holds over any window, a burst that is there once. Sans-IO: it is told the time.

What it gives: within a window of t ns at most ``size`` tokens and what is refilled in t, and the burst. Whoever wants
more than ``size`` at once gets it from a full bucket, and the bucket owes it: nothing is given until that is refilled.
"""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class TokenBucketState(NamedTuple):
    """A bucket as it is saved: its settings, what is left, and how long ago (ns) the last token was refilled."""

    size: int
    refill_time: int
    one_time_burst: int
    budget: int
    elapsed_ns: int


class TokenBucket:
    """``size`` tokens, refilled over ``refill_time`` ms; a size or time of 0 means no limit. Never blocks."""

    __slots__ = ("_budget", "_burst", "_last", "_now_ns", "_refill_time_ns", "_size")

    def __init__(
        self, size: int, refill_time: int, one_time_burst: int, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._size = size
        self._refill_time_ns = refill_time * 1_000_000
        self._burst = one_time_burst
        self._budget = size
        self._now_ns = now_ns
        self._last = now_ns()

    @property
    def limits(self) -> bool:
        """Whether it limits anything."""
        return bool(self._size and self._refill_time_ns)

    def take(self, tokens: int) -> bool:
        """Take ``tokens`` if they are there, the burst first."""
        if not self.fits(tokens):
            return False
        self.spend(tokens)
        return True

    def fits(self, tokens: int) -> bool:
        """Tell whether :meth:`take` would succeed now."""
        missing = tokens - self._burst
        if missing <= 0 or not self._size or not self._refill_time_ns:
            return True
        if self._budget < missing:
            self._refill()
        return self._budget >= min(missing, self._size)

    def spend(self, tokens: int) -> None:
        """Take ``tokens`` that fit."""
        if not self._size or not self._refill_time_ns:
            return
        from_burst = min(tokens, self._burst)
        self._burst -= from_burst
        if tokens > from_burst:
            self._refill()
            self._budget -= tokens - from_burst

    def _refill(self) -> None:
        now = self._now_ns()
        gained = (now - self._last) * self._size // self._refill_time_ns
        if self._budget + gained >= self._size:
            self._budget = self._size
            self._last = now
        elif gained:
            self._budget += gained
            # Only the time of whole tokens is used up, rounded up: frequent calls lose nothing and gain nothing.
            self._last += -(-gained * self._refill_time_ns // self._size)

    def room_ns(self, tokens: int) -> int:
        """Return in how many ns :meth:`take` can succeed, 0 if it can now."""
        if self.fits(tokens):
            return 0
        missing = min(tokens - self._burst, self._size) - self._budget
        return max(1, self._last + -(-missing * self._refill_time_ns // self._size) - self._now_ns())

    def save(self) -> TokenBucketState:
        """Return what :func:`restored_bucket` makes the bucket of."""
        refill_time = self._refill_time_ns // 1_000_000
        return TokenBucketState(self._size, refill_time, self._burst, self._budget, self._now_ns() - self._last)


def restored_bucket(state: TokenBucketState, now_ns: Callable[[], int] = time.monotonic_ns) -> TokenBucket:
    """Return a bucket that goes on where another one was saved. The time in between does not count."""
    bucket = TokenBucket(state.size, state.refill_time, state.one_time_burst, now_ns)
    bucket._budget = state.budget
    bucket._last = now_ns() - state.elapsed_ns
    return bucket
