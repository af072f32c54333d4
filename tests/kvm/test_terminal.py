"""Standard input as people and scripts have it: a terminal, a terminal of somebody else, /dev/null, an ended pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from devtool.project import ROOT
from tests.guests.build import build
from tests.harness.microvms import write_config

FIRECRACKER = ROOT / ".venv" / "bin" / "firecracker"
PATIENCE_S = 60


def command(directory: Path, guest: str) -> list[str]:
    config = write_config(directory, build(guest), boot_args="quiet")
    return [str(FIRECRACKER), "--no-api", "--config-file", str(config)]


class Terminal:
    """A pseudo-terminal that is the controlling terminal of a process; ``background`` takes it away from it first."""

    def __init__(self, arguments: list[str], *, background: bool = False) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.output = bytearray()
        self.pid = os.fork()
        if self.pid == 0:
            _run(slave, arguments, background)
        os.close(slave)

    def expect(self, words: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.output:
            assert time.monotonic() < deadline, self.output.decode(errors="replace")
            self._read(0.1)

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.output += os.read(self.master, 1 << 16)
            except OSError:
                time.sleep(seconds)  # nobody holds the other side

    def wait(self) -> int:
        """Wait for the end (reading the output on); returns the exit status, or minus a signal, stops included."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it did not end:\n" + self.output.decode(errors="replace"))

    def close(self) -> None:
        os.close(self.master)


def _run(slave: int, arguments: list[str], background: bool) -> None:
    """In the child: be a session leader like a shell, and run the command as a job. Its status is ours."""
    try:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(slave, descriptor)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # as a shell does, to hand the terminal over
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            if not background:
                os.tcsetpgrp(0, os.getpgrp())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            os.execv(arguments[0], arguments)
        _, status = os.waitpid(job, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.kill(job, signal.SIGKILL)
            os._exit(100 + os.WSTOPSIG(status))
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))  # as a shell says it
    finally:
        os._exit(99)


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_terminal_is_used_and_left_as_it_was(tmp_path, background):
    """In the background its use would stop the controller (SIGTTOU, SIGTTIN) and the guest's clock with it."""
    terminal = Terminal(command(tmp_path, "reset"), background=background)
    assert terminal.wait() == 0, terminal.output.decode(errors="replace")
    assert b"exit_code=0" in terminal.output
    assert termios.tcgetattr(terminal.master) == terminal.before
    terminal.close()


def test_a_terminal_is_raw_while_the_guest_runs_and_restored_after_a_signal(tmp_path):
    terminal = Terminal(command(tmp_path, "spin"))
    terminal.expect(b"spinning")
    assert not termios.tcgetattr(terminal.master)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    os.write(terminal.master, b"\x03typed\n")  # Ctrl-C belongs to the guest
    children = [int(line.split()[0]) for line in _processes(terminal.pid)]
    os.kill(children[0], signal.SIGTERM)
    assert terminal.wait() == 128 + signal.SIGTERM
    assert termios.tcgetattr(terminal.master) == terminal.before
    terminal.close()


def _processes(parent: int) -> list[str]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["null", "file", "ended pipe"])
def test_standard_input_without_a_terminal(tmp_path, kind):
    (tmp_path / "input").write_bytes(b"typed ahead\n")
    reader, writer = os.pipe()
    os.close(writer)
    paths = {"null": "/dev/null", "file": tmp_path / "input", "ended pipe": f"/proc/self/fd/{reader}"}
    with open(paths[kind], "rb") as source:
        done = subprocess.run(
            command(tmp_path, "reset"), stdin=source, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=False
        )
    os.close(reader)
    assert done.returncode == 0, done.stdout.decode()
