"""Running long commands: with progress, their output kept for when they fail, and ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from devtool.project import DevError, say

_HEARTBEAT_SECONDS = 10.0
_FAILURE_TAIL_LINES = 40
#: What a command that is to end may take to remove what it has made.
_END_SECONDS = 60.0


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process in order, through every `finally`."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)


class _HeldSignals:
    """Keeps what would end this process until it is released; a child that is started meanwhile has its defaults."""

    def __init__(self) -> None:
        self._held: list[int] = []
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handlers = {number: handler for number in ends if callable(handler := signal.getsignal(number))}
        for number in self._handlers:
            signal.signal(number, lambda came, _frame: self._held.append(came))

    def release(self) -> None:
        """Take the handlers back, and call them for what has come."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for came in self._held:
            signal.raise_signal(came)


def run(
    command: Sequence[str], *, cwd: Path | None = None, environment: Mapping[str, str], stop: int = signal.SIGTERM
) -> int:
    """Run a command with our output and return its exit status. Whatever ends this process ends it, too, in order.

    `stop`: the signal that asks the command to end; it has a minute for it.
    """
    held = _HeldSignals()  # one that came while Popen works would leave the command running
    try:
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, env=dict(environment))
    except BaseException:
        held.release()
        raise
    try:
        held.release()
        return process.wait()
    except BaseException:
        if process.poll() is None:
            process.send_signal(stop)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def run_step(
    what: str,
    command: Sequence[str | Path],
    *,
    advice: str = "",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a command that takes a while: say what it is, report that it still runs, show its output if it fails.

    Raises DevError with the end of the output and `advice`.
    """
    say(f"{what} …")
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=None if environment is None else {**os.environ, **environment},
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=_HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  … still at it ({time.monotonic() - started:.0f} s)")
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status == 0:
            say(f"  done in {time.monotonic() - started:.1f} s")
            return
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    for line in lines[-_FAILURE_TAIL_LINES:]:
        print(f"    {line}", file=sys.stderr)
    raise DevError(f"{what}: {command[0]} ended with status {status}. {advice}".rstrip())
