"""How long the steps of a boot took."""

from __future__ import annotations

import time


class Timings:
    """Collects (step, nanoseconds) in order."""

    __slots__ = ("_last", "steps")

    def __init__(self) -> None:
        self._last = time.monotonic_ns()
        self.steps: list[tuple[str, int]] = []

    def done(self, step: str) -> None:
        """End ``step``, which began when the step before it ended."""
        now = time.monotonic_ns()
        self.steps.append((step, now - self._last))
        self._last = now
