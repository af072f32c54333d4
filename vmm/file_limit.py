"""SIGXFSZ: a write beyond the file-size limit (RLIMIT_FSIZE) ends the microVM with exit code 151.

The interpreter ignores the signal, and the write fails with EFBIG. Here it is caught, and what was going on is given
up: a client whose request led to the write loses its connection instead of hearing of a file that is too large.
Writes that may fail harmlessly are made inside ``Tolerated``.
"""

from __future__ import annotations

from base.lean_std import signal


class FileSizeLimitReached(BaseException):
    """A file has reached the limit. No ``Exception``: nothing in between is to handle it."""

    def __init__(self) -> None:
        # The kernel itself sends it, as if by kill(2): code 0 (SI_USER).
        super().__init__(f"Shutting down VM after intercepting signal {int(signal.SIGXFSZ)}, code 0.")


class Tolerated:
    """Inside, a write beyond the limit only fails."""

    depth = 0

    def __enter__(self) -> None:
        Tolerated.depth += 1

    def __exit__(self, *_: object) -> None:
        Tolerated.depth -= 1


def catch() -> None:
    """Catch the signal from now on; to be called by the main thread, before the seccomp filter is installed.

    It raises FileSizeLimitReached once: what is written while that is handled may fail, as far as it has to.
    """
    signal.signal(signal.SIGXFSZ, _handle)


def _handle(_number: int, _frame: object) -> None:
    if not Tolerated.depth:
        Tolerated.depth += 1
        raise FileSizeLimitReached
