"""How far a long command is: a line on the terminal, and nothing where there is none."""

from __future__ import annotations

import sys
from time import monotonic

_EVERY_SECONDS = 0.2


class Progress:
    """Tells of ``total`` bytes, at most a few times a second."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = max(total, 1)
        self.done = 0
        self._is_shown = sys.stderr.isatty()
        self._told = 0.0

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self.done += count
        now = monotonic()
        if self._is_shown and now - self._told >= _EVERY_SECONDS:
            self._told = now
            sys.stderr.write(f"\r{self.what}: {100 * self.done // self.total} % of {size_text(self.total)} ")
            sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._told:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def size_text(size: int) -> str:
    """Return a number of bytes as a person reads it."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} bytes"
