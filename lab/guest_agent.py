"""Runs commands in a guest through its agent (guest_agent.c): over the console, or over any stream that has its lines.

`build()` compiles the agent; `Agent` is the host's side.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from devtool.project import DevError, cache_directory
from lab.client import ClientError, Microvm, without_log

VERSION = "1"
_MARK = "CELLBLOCK-AGENT "
_SOURCE = Path(__file__).resolve().parent / "guest_agent.c"
_OPTIONS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-static", "-s")


def build() -> Path:
    """Return the agent's static executable; compiles it if this source was not built before. Raises DevError."""
    digest = hashlib.sha256(f"{_OPTIONS}".encode() + _SOURCE.read_bytes())
    target = cache_directory() / "guest-programs" / f"agent-{digest.hexdigest()[:24]}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        made = Path(scratch) / "agent"
        command = ["gcc", *_OPTIONS, "-o", str(made), str(_SOURCE)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise DevError(f"the guest's agent does not compile:\n{done.stdout}")
        os.replace(made, target)
    return target


class AgentError(ClientError):
    """The agent refused, said something that it cannot say, or a command failed that must not."""


class Result(NamedTuple):
    """How a command ended. ``status`` as a shell says it: 128 + N for signal N."""

    status: int
    stdout: str
    stderr: str


class Stream(Protocol):
    """What the agent is at the other end of."""

    def send(self, text: str) -> None:
        """Send it."""

    def receive(self, seconds: float) -> str:
        """Return what has come, after waiting for something at most ``seconds``; raises ClientError at the end."""


class Console:
    """A microVM's console as the agent's stream. The program's log comes on it, too, anywhere between two letters."""

    def __init__(self, microvm: Microvm) -> None:
        self._microvm = microvm
        self._at = len(microvm.console)

    def send(self, text: str) -> None:
        """Type."""
        self._microvm.type(text)

    def receive(self, seconds: float) -> str:
        """Return what came; complete lines of the log are still in it (`without_log`)."""
        if self._at == len(self._microvm.console) and not self._microvm.pump(seconds):
            raise ClientError(f"the microVM ended:\n{self._microvm.tail()}")
        part = bytes(self._microvm.console[self._at :])
        self._at += len(part)
        return part.decode("latin-1")  # the agent's lines are ASCII


class _Running:
    def __init__(self) -> None:
        self.written = {"out": bytearray(), "err": bytearray()}
        self.result: Result | None = None


class Agent:
    """The host's side. Commands may run beside each other: `start` them, then `wait`."""

    def __init__(self, stream: Stream, timeout: float = 60.0) -> None:
        """Wait until the agent says that it is ready."""
        self._stream = stream
        self._unread = ""
        self._ready = ""
        self._ended = False
        self._last = 0
        self._commands: dict[int, _Running] = {}
        self._until(lambda: bool(self._ready), timeout, "the agent is not ready")
        if self._ready != VERSION:
            raise AgentError(f"the guest's agent speaks version {self._ready}, not {VERSION}: make its disk anew")

    @classmethod
    def log_in(cls, microvm: Microvm, timeout: float = 60.0) -> Agent:
        """Log in at the prompt `login:` that has come, as root, and run the agent in the place of the shell."""
        microvm.type("root\n")
        microvm.expect("# ", timeout, to_line_end=False)
        console = Console(microvm)
        microvm.type("exec cellblock-agent\n")
        return cls(console, timeout)

    def start(self, command: str) -> int:
        """Start a shell command in the guest; return its number."""
        self._last += 1
        self._commands[self._last] = _Running()
        self._stream.send(f"run {self._last} {base64.b64encode(command.encode()).decode()}\n")
        return self._last

    def wait(self, number: int, timeout: float = 120.0) -> Result:
        """Wait for a command's end; return how it ended. Raises AgentError after ``timeout`` seconds."""
        command = self._commands[number]
        self._until(lambda: command.result is not None, timeout, f"command {number} did not end")
        del self._commands[number]
        assert command.result is not None
        return command.result

    def run(self, command: str, timeout: float = 120.0) -> Result:
        """Run a shell command in the guest; return how it ended."""
        return self.wait(self.start(command), timeout)

    def must(self, command: str, timeout: float = 120.0) -> str:
        """Run a command that has to succeed; return its standard output."""
        result = self.run(command, timeout)
        if result.status != 0:
            raise AgentError(f"{command!r} ended with {result.status} in the guest:\n{result.stdout}{result.stderr}")
        return result.stdout

    def kill(self, number: int, signal: int = 15) -> None:
        """Send a signal to a command and to all that it has started."""
        self._stream.send(f"kill {number} {signal}\n")

    def quit(self, timeout: float = 60.0) -> None:
        """Let the agent end, when no command runs any more, and wait for it: the console is another's then."""
        self._stream.send("quit\n")
        self._until(lambda: self._ended, timeout, "the agent did not end")

    def output_so_far(self, number: int) -> str:
        """Return what a running command has written to standard output until now."""
        self._take(self._stream.receive(0.0))
        return self._commands[number].written["out"].decode(errors="replace")

    def last_words(self, number: int) -> str:
        """Return what a command of a guest that has ended wrote to standard output, as far as it came."""
        try:
            while text := self._stream.receive(0.0):
                self._take(text)
        except ClientError:
            pass  # the end of the stream
        return self._commands[number].written["out"].decode(errors="replace")

    def _until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentError(f"{what} within {timeout:g} s; last heard: {self._unread[-200:]!r}")
            self._take(self._stream.receive(min(left, 1.0)))

    def _take(self, text: str) -> None:
        """Take in what has come: whole lines, without those of the log."""
        self._unread += text
        whole, end, rest = self._unread.rpartition("\n")
        lines = without_log(whole + end).split("\n")
        self._unread = lines.pop() + rest  # a line of the log may have come into one of the agent's
        for line in lines:
            if line.startswith(_MARK):
                self._take_line(line.removeprefix(_MARK).strip())

    def _take_line(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "ready":
            self._ready = rest
            return
        if kind == "ended":
            self._ended = True
            return
        number, _, rest = rest.partition(" ")
        try:
            command = self._commands[int(number)]
            if kind == "refused":
                raise AgentError(f"the guest's agent refused command {number}: {rest}")
            if kind == "exit":
                command.result = _ended(command, [int(word) for word in rest.split()])
            else:
                command.written[kind] += base64.b64decode(rest, validate=True)
        except (KeyError, ValueError, binascii.Error) as error:
            raise AgentError(f"the guest's agent said {line!r}: {error}") from error


def _ended(command: _Running, numbers: list[int]) -> Result:
    status, *counts = numbers
    came = [len(data) for data in command.written.values()]
    if counts != came:
        raise AgentError(f"{came} bytes of its output came, {counts} were sent: the console lost some")
    out, err = (data.decode(errors="replace") for data in command.written.values())
    return Result(status, out, err)
