"""Real processes for tests of what two processes share."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

#: A bound against a hanging suite; nothing is measured with it.
PATIENCE_SECONDS = 60


def wait_for(
    condition: Callable[[], Any],
    what: str | Callable[[], str] = "",
    seconds: float = PATIENCE_SECONDS,
    *,
    spin: bool = False,
) -> Any:
    """Return the first true value of a condition; fails the test when it does not come.

    ``what`` is said then. With ``spin`` the processor is given to others between two looks, and nothing more.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out waiting for {what if isinstance(what, str) else what()}")
        time.sleep(0 if spin else 0.001)
    return value


class Child:
    """A forked process that runs one function and hands its result (JSON) or its traceback back to ``join``."""

    def __init__(self, function: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _run(function, writer)
        os.close(writer)
        self._reader = reader
        self._reaped = False

    def join(self) -> Any:
        """Wait for the end; return the function's result. Fails with the child's traceback or its end by a signal."""
        output = bytearray()
        while chunk := self._read():
            output += chunk
        status = self._reap()
        assert os.WIFEXITED(status), f"ended by signal {os.WTERMSIG(status)}"
        assert os.WEXITSTATUS(status) == 0, output.decode(errors="replace")
        return json.loads(output)

    def wait(self) -> int:
        """Wait for the end; return the exit status, or minus the signal number."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(self._reap())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child, if it was not reaped yet."""
        if not self._reaped:
            os.kill(self.pid, number)

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._reader], [], [], PATIENCE_SECONDS)
        if not ready:
            self.kill()
            raise AssertionError(f"process {self.pid} did not end within {PATIENCE_SECONDS} s")
        return os.read(self._reader, 1 << 16)

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self._reaped = True
        os.close(self._reader)
        self._reader = -1
        return status

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._reaped:
            self.kill()
            self._reap()


def _run(function: Callable[[], Any], writer: int) -> None:
    status = 1
    try:
        result = json.dumps(function()).encode()
        status = 0
    except BaseException:
        result = traceback.format_exc().encode()
        os.write(2, result)
    try:
        os.write(writer, result)
    finally:
        os._exit(status)


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """Return the open descriptors of a process and what they point to."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    return found
