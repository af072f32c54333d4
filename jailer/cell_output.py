"""What cells write to standard error: a pipe for each, which only the supervisor reads.

A cell so holds nothing of the client's terminal: it can neither read what is typed there nor send it control sequences.
The supervisor writes whole lines on, escaped, those of workers with the name of the cell before them. The controller's
have none: it speaks for the program, and clients compare what it says. Neither side ever blocks.
"""

from __future__ import annotations

import os
import select
import time

from base.lean_typing import Callable
from ipc.launch_plan import LaunchPlan
from jailer import walls

#: What a cell may write at once, and per second in the long run; what is more stays in its pipe, and then is lost.
BURST = 64 << 10
BYTES_PER_S = 4 << 10
#: At its end a cell may have so many bytes more: they may say why.
LAST_WORDS = 4 << 10
#: A longer line is broken. With a label and escapes it may still be cut: a pipe takes PIPE_BUF bytes at once.
MAX_LINE = 1024
_LEAST_READ = 512
_STANDARD_ERROR = 2
#: Control characters, line separators, and what turns the direction of text.
_ESCAPES = {number: f"\\x{number:02x}" for number in (*range(0x20), 0x7F, *range(0x80, 0xA0))} | {
    number: f"\\u{number:04x}" for number in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class LogPipe:
    """A pipe around the fork of a cell: made before, then each side takes its end. Without the wall there is none."""

    __slots__ = ("_read_end", "_write_end")

    def __init__(self, plan: LaunchPlan) -> None:
        """Raises OSError."""
        wanted = walls.LOG_PIPE not in plan.switched_off
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if wanted else (-1, -1)

    def become_standard_error(self) -> None:
        """In the cell, which closes the rest with all that it does not need. Raises OSError."""
        if self._write_end >= 0:
            os.dup2(self._write_end, _STANDARD_ERROR)

    def take(self, label: str) -> CellOutput | None:
        """In the supervisor: return its end."""
        if self._write_end < 0:
            return None
        os.close(self._write_end)
        return CellOutput(self._read_end, label)

    def close(self) -> None:
        """There is no cell after all."""
        for end in (self._read_end, self._write_end):
            if end >= 0:
                os.close(end)


class CellOutput:
    """The supervisor's end of one cell's pipe. ``descriptor`` is -1 when the cell has closed its own."""

    __slots__ = ("_allowance", "_clock", "_last", "_pending", "descriptor", "label", "last_line", "limited")

    def __init__(self, descriptor: int, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.descriptor = descriptor
        self.label = label
        #: It has written more than it may.
        self.limited = False
        #: The last line that was not empty, without the label.
        self.last_line = ""
        self._clock = clock
        self._last = clock()
        self._allowance = float(BURST)
        self._pending = b""

    def is_due(self) -> bool:
        """Is there anything to wait for, and may the cell be read?"""
        return self.descriptor >= 0 and not self.wait()

    def is_held(self) -> bool:
        """Will it have to be read when :meth:`wait` is over?"""
        return self.descriptor >= 0 and self.wait() > 0

    def wait(self) -> float:
        """Return how many seconds the cell has to wait until it is read again: 0 if it need not."""
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._last) * BYTES_PER_S)
        self._last = now
        return max(0.0, (_LEAST_READ - self._allowance) / BYTES_PER_S)

    def read(self) -> list[str]:
        """Take what the cell may have written by now; return the lines that became whole, ready to be written."""
        if self.descriptor < 0 or self.wait():
            return []
        try:
            data = os.read(self.descriptor, int(self._allowance))
        except (BlockingIOError, InterruptedError):
            return []
        self._allowance -= len(data)
        if self._allowance < _LEAST_READ:
            self.limited = True
        if not data:
            self.close()
        return self._lines(data)

    def drain(self) -> list[str]:
        """Take what a cell that has ended left in its pipe, as far as it may, and close it."""
        lines = []
        self.wait()
        self._allowance = max(self._allowance, LAST_WORDS)
        while self.descriptor >= 0 and self._allowance >= 1:
            before = self._allowance
            try:
                data = os.read(self.descriptor, int(self._allowance))
            except OSError:
                break
            self._allowance = before - len(data)
            if not data:
                break
            lines += self._lines(data)
        self.close()
        return lines + self._lines(b"\n" if self._pending else b"")

    def _lines(self, data: bytes) -> list[str]:
        *whole, self._pending = (self._pending + data).split(b"\n")
        pieces = []
        for line in whole:
            pieces += [line[at : at + MAX_LINE] for at in range(0, len(line) or 1, MAX_LINE)]
        while len(self._pending) >= MAX_LINE:
            pieces.append(self._pending[:MAX_LINE])
            self._pending = self._pending[MAX_LINE:]
        texts = [escape(piece) for piece in pieces]
        self.last_line = next((text for text in reversed(texts) if text), self.last_line)
        return [f"{self.label}{text}" for text in texts]

    def close(self) -> None:
        """Close our end: what the cell writes from now on goes nowhere."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def escape(line: bytes) -> str:
    """Return a line as text that a terminal only shows."""
    return line.decode("utf-8", "backslashreplace").translate(_ESCAPES)


def write(lines: list[str]) -> int:
    """Write lines to our standard error as far as its reader takes them; return how many were lost."""
    lost = 0
    poll = select.poll()
    poll.register(_STANDARD_ERROR, select.POLLOUT)
    for line in lines:
        data = f"{line}\n".encode()
        if len(data) > select.PIPE_BUF:
            data = data[: select.PIPE_BUF - 4] + b"...\n"
        try:
            if poll.poll(0):
                os.write(_STANDARD_ERROR, data)
                continue
        except OSError:
            pass  # nobody reads it any more
        lost += 1
    return lost
