"""QEMU's monitor (QMP): asks a lab that answers no more where its processors are."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

#: How long the emulated kernel may take to write its report after the interrupt that asks for it.
_REPORT_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_LIMIT = 1 << 20


class Monitor:
    """One QMP connection. Best effort: what cannot be had is empty, for it only adds to another error's text."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._greeted = False

    def diagnose(self, wait: Callable[[float], object]) -> str:
        """Return where each processor is; then let the kernel report on its console, and end, by an unknown NMI.

        `wait`: waits at most that many seconds for QEMU's end.
        """
        registers = str(self._execute("human-monitor-command", {"command-line": "info registers -a"}) or "")
        lines = [line.strip() for line in registers.splitlines() if re.search(r"^CPU#|^[RE]IP=", line)]
        self._execute("inject-nmi", {})
        wait(_REPORT_SECONDS)
        return "\n".join(f"    {line}" for line in lines)

    def _execute(self, command: str, arguments: dict[str, str]) -> object:
        """Run a command; returns its answer, None if it fails."""
        try:
            self._connection.settimeout(_ANSWER_SECONDS)
            if not self._greeted:
                self._greeted = True
                self._execute("qmp_capabilities", {})
            self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
            return self._answer()
        except (OSError, ValueError):
            return None

    def _answer(self) -> object:
        """Read until an answer comes: the greeting and events come in between."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline and len(self._buffer) < _LIMIT:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                message = json.loads(line)
                if isinstance(message, dict) and ("return" in message or "error" in message):
                    return message.get("return")
                continue
            data = self._connection.recv(65536)
            if not data:
                return None
            self._buffer += data
        return None
