"""The supervisor's own lines: Firecracker's log format for people, one JSON object per cell for the walls.

Never blocks: a reader that does not read costs lines (counted), not the supervisor's time.
"""

from __future__ import annotations

import os
import select
import time
from _json import encode_basestring_ascii  # by itself: the json package loads re and six others at each start

from base.errno_text import errno_text
from base.lean_typing import Any
from jailer.errors import StepError

#: A pipe is writable for poll(2) when PIPE_BUF bytes fit, so a longer line could block.
MAX_LINE = 4096


class Log:
    """Lines to one descriptor, which stays the caller's."""

    def __init__(self, descriptor: int, microvm_id: str, name: str = "supervisor") -> None:
        self.descriptor = descriptor
        self.name = name
        self.lost = 0
        #: Whether somebody wants the walls' reports, which are for programs.
        self.reports = False
        self._id = microvm_id

    def open_reports(self, path: str) -> None:
        """``--wall-log``: append everything to this file from now on, the walls' reports included. Raises StepError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise StepError(f"Failed to open file {path}: {errno_text(error)}") from None
        self.reports = True

    def error(self, text: str) -> None:
        """Report what went wrong."""
        self._line("ERROR", text)

    def warning(self, text: str) -> None:
        """Report what is not as it should be."""
        self._line("WARN", text)

    def info(self, text: str) -> None:
        """Report what happened."""
        self._line("INFO", text)

    def _line(self, level: str, text: str) -> None:
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now // 1_000_000_000))
        one_line = " ".join(text.splitlines())
        self._write(f"{stamp}.{now % 1_000_000_000:09d} [{self._id}:{self.name}:{level}] {one_line}\n")

    def record(self, values: dict[str, Any]) -> None:
        """Write one JSON object on one line; a long one is written in pieces, as far as the reader takes them."""
        data = (json_text(values) + "\n").encode()
        for offset in range(0, len(data), MAX_LINE):
            self._write_bytes(data[offset : offset + MAX_LINE])

    def _write(self, line: str) -> None:
        data = line.encode("utf-8", "replace")
        self._write_bytes(data if len(data) <= MAX_LINE else data[: MAX_LINE - 4] + b"...\n")

    def _write_bytes(self, data: bytes) -> None:
        try:
            poll = select.poll()
            poll.register(self.descriptor, select.POLLOUT)
            if poll.poll(0):
                os.write(self.descriptor, data)
                return
        except (OSError, ValueError):
            pass  # nobody reads it any more, or the file is full
        self.lost += 1


def json_text(value: Any) -> str:
    """Return compact JSON of dictionaries with text keys, lists, tuples, text, integers, booleans and None."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return str(encode_basestring_ascii(value))
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, dict):
        return "{" + ",".join([f"{json_text(key)}:{json_text(item)}" for key, item in value.items()]) + "}"
    return "[" + ",".join([json_text(item) for item in value]) + "]"
