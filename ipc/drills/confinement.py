"""Attacks on what Landlock bounds beside the network: files, and signals beyond the microVM."""

from __future__ import annotations

import os
import signal

from base.lean_typing import Callable


def _execute(path: str) -> str:
    """Be a shell, which says so."""
    os.execv(path, (path, "-c", f"echo 'drill run-shell={path}: succeeded' >&2"))


def _make_fifo(path: str) -> str:
    """Make a file of a kind that no controller makes."""
    os.mkfifo(path)
    return path


def _end(process: str) -> str:
    """End a process by its number."""
    os.kill(int(process), signal.SIGKILL)
    return f"process {process}"


#: No attempt without a target: files.py and processes.py have them.
ATTEMPTS: dict[str, Callable[[], str]] = {}
AIMED: dict[str, Callable[[str], str]] = {"run-shell": _execute, "make-fifo": _make_fifo, "end": _end}
