"""Drives `firecracker` and `jailer` as any client would: command line, API socket, console."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from devtool.project import LAUNCHERS

FIRECRACKER = LAUNCHERS / "firecracker"
JAILER = LAUNCHERS / "jailer"
CHROOT_BASE = Path("/srv/jailer")


class ClientError(Exception):
    """The microVM did not do what the client asked for; the text holds what it printed last."""


class Reply(NamedTuple):
    """An API reply: status code, headers as received (names in lower case), parsed body or None."""

    status: int
    headers: dict[str, str]
    body: Any


def request(path: Path | str, method: str, target: str, body: Any = None, timeout: float = 60.0) -> Reply:
    """Send one request over a UNIX socket and return the reply."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if payload:
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(head.encode() + b"\r\n" + payload)
        return _read_reply(connection)


def _read_reply(connection: socket.socket) -> Reply:
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            raise ClientError(f"the API closed the connection after {received!r}")
        received += part
    head, _, rest = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", "0"))
    while len(rest) < length:
        rest += connection.recv(65536)
    return Reply(int(lines[0].split()[1]), headers, json.loads(rest) if rest else None)


#: A line of the log: for people, or a JSON object. It has the same output as the guest's console.
_LOG_LINE = r"(?:\d{4}-\d\d-\d\dT[^\n]*\n|\{\"[^\n]*\n)"


def without_log(console: bytes | bytearray | str) -> str:
    """Return what the guest said. The log goes to the same place, also between two letters of the guest."""
    text = console if isinstance(console, str) else console.decode(errors="replace")
    return re.sub(_LOG_LINE, "", text)


def _with_log_between(text: str) -> re.Pattern[bytes]:
    """Return a pattern for ``text`` that lines of the log may have come into."""
    between = f"{_LOG_LINE}*".encode()
    return re.compile(between.join(re.escape(letter.encode()) for letter in text))


class Microvm:
    """One running `firecracker` or `jailer` process with its console on pipes."""

    def __init__(self, command: Sequence[str], api_socket: Path, environment: Mapping[str, str] | None = None) -> None:
        self.api_socket = api_socket
        self.console = bytearray()
        self._seen = 0
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout.fileno()
        os.set_blocking(self._output, False)

    # ------------------------------------------------------------ console

    def pump(self, seconds: float = 0.0) -> bool:
        """Read console output that is there (or comes within ``seconds``); False at its end."""
        ready, _, _ = select.select([self._output], [], [], seconds)
        if not ready:
            return True
        try:
            part = os.read(self._output, 65536)
        except BlockingIOError:
            return True
        self.console += part
        return bool(part)

    def expect(self, text: str, timeout: float = 60.0, *, to_line_end: bool = True) -> str:
        """Wait until ``text`` appears in what was not looked at yet; return all up to and including its line.

        ``to_line_end`` off, for a prompt: up to the text itself.
        """
        wanted = _with_log_between(text)
        deadline = time.monotonic() + timeout
        while True:
            match = wanted.search(self.console, self._seen)
            if match:
                end = self.console.find(b"\n", match.end() - 1) + 1 if to_line_end else match.end()
                if end > 0:
                    found = self.console[self._seen : end]
                    self._seen = end
                    return found.decode(errors="replace")
            if not self.pump(0.1) and not wanted.search(self.console, self._seen):
                raise ClientError(f"the microVM ended before {text!r} came:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ClientError(f"no {text!r} within {timeout} s:\n{self.tail()}")

    def has_come(self, text: str) -> bool:
        """Tell whether ``text`` is in what was not looked at yet, without waiting."""
        self.pump()
        return _with_log_between(text).search(self.console, self._seen) is not None

    def type(self, text: str) -> None:
        """Type on the serial console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def tail(self, lines: int = 150) -> str:
        """Return the last lines of the output."""
        return "\n".join(self.console.decode(errors="replace").splitlines()[-lines:])

    # ------------------------------------------------------------ API

    def wait_for_api(self, timeout: float = 120.0) -> None:
        """Wait until the API answers. The first launch in a lab was seen to take more than 30 s beside others."""
        deadline = time.monotonic() + timeout
        while True:
            self.pump()
            try:
                if request(self.api_socket, "GET", "/version", timeout=timeout).status == 200:
                    return
            except OSError:
                pass
            if self.process.poll() not in (None, 0) or time.monotonic() > deadline:
                self.pump(0.2)
                raise ClientError(f"the API did not come up (exit status {self.process.poll()}):\n{self.tail()}")
            time.sleep(0.005)

    def api(self, method: str, target: str, body: Any = None) -> Reply:
        """Send a request; the console is read meanwhile only as far as the pipe needs it."""
        self.pump()
        return request(self.api_socket, method, target, body)

    def must(self, method: str, target: str, body: Any = None) -> Any:
        """Send a request that has to succeed; return the body."""
        reply = self.api(method, target, body)
        if reply.status not in (200, 204):
            self.pump(0.2)  # what was logged about it
            raise ClientError(f"{method} {target}: {reply.status} {reply.body}\n{self.tail()}")
        return reply.body

    # ------------------------------------------------------------ end

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the end of the process, reading its output; return the exit status."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.pump(0.05)
            if time.monotonic() > deadline:
                raise ClientError(f"the microVM did not end within {timeout} s:\n{self.tail()}")
        while self.pump(0.05) and select.select([self._output], [], [], 0)[0]:
            pass
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to the visible process, as clients do."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Kill what still runs and release the pipes."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass

    def __enter__(self) -> Microvm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Jail:
    """The jail root of one microVM, prepared as a client does it before it calls the jailer."""

    def __init__(self, microvm_id: str, uid: int = 10000, gid: int = 10000, base: Path = CHROOT_BASE) -> None:
        self.id = microvm_id
        self.uid = uid
        self.gid = gid
        self.base = base
        self.directory = base / "firecracker" / microvm_id
        self.root = self.directory / "root"
        self.root.mkdir(parents=True, exist_ok=True)

    def add(self, source: Path | str, name: str) -> str:
        """Copy a file into the jail, readable for its user; return its path inside."""
        target = self.root / name
        shutil.copyfile(source, target)
        os.chown(target, self.uid, self.gid)
        return f"/{name}"

    def link(self, source: Path, name: str) -> str:
        """Give the jail a file of the same file system under another name, so that it stays when the jail is removed.

        It belongs to the jail's user afterwards. Returns its path inside.
        """
        os.link(source, self.root / name)
        os.chown(source, self.uid, self.gid)
        return f"/{name}"

    def write(self, content: str | bytes, name: str) -> str:
        """Write a file into the jail; return its path inside."""
        target = self.root / name
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chown(target, self.uid, self.gid)
        return f"/{name}"

    def command(self, jailer_options: Sequence[str] = (), arguments: Sequence[str] = ()) -> list[str]:
        """Return the jailer's command line."""
        # fmt: off
        return [
            str(JAILER), "--id", self.id, "--exec-file", str(FIRECRACKER), "--uid", str(self.uid),
            "--gid", str(self.gid), "--chroot-base-dir", str(self.base), *jailer_options, "--", *arguments,
        ]
        # fmt: on

    def launch(self, jailer_options: Sequence[str] = (), arguments: Sequence[str] = ()) -> Microvm:
        """Start the jailer."""
        return Microvm(self.command(jailer_options, arguments), self.root / "run" / "firecracker.socket")

    def remove(self) -> None:
        """Remove the jail's directories, as the operator does after the microVM has ended."""
        shutil.rmtree(self.directory, ignore_errors=True)


def launch_unjailed(directory: Path, arguments: Sequence[str] = ()) -> Microvm:
    """Start `firecracker` directly, its API socket in ``directory``."""
    api_socket = directory / "firecracker.socket"
    return Microvm([str(FIRECRACKER), "--api-sock", str(api_socket), *arguments], api_socket)


def descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``, itself first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for each in found:
        found.extend(sorted(children.get(each, ())))
    return found
