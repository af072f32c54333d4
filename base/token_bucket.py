"""A token bucket: a rate that holds over any window, a burst that is there once. Sans-IO: it is told the time.

What it gives: within a window of t ns at most ``size`` tokens and what is refilled in t, and the burst.
"""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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

    def take(self, tokens: int) -> bool:
        """Take ``tokens`` if they are there."""
        if not self._size or not self._refill_time_ns:
            return True
        if self._burst >= tokens:
            self._burst -= tokens
            return True
        self._refill()
        if self._budget < tokens:
            return False
        self._budget -= tokens
        return True

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
        """Return in how many ns :meth:`take` can succeed, 0 if it can now. More than ``size`` count as ``size``."""
        if not self._size or not self._refill_time_ns or self._burst >= tokens:
            return 0
        self._refill()
        missing = min(tokens, self._size) - self._budget
        if missing <= 0:
            return 0
        return max(1, self._last + -(-missing * self._refill_time_ns // self._size) - self._now_ns())
