"""The client's terminal: no cell can read what is typed there, type, or send it control sequences."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.jail import JailedMicrovm, descriptors, id_of, microvm, stand_in, wait_for

WITHOUT_CONSOLE = ("--console", "none", "--exerciser")


class Terminal:
    """A pseudo-terminal that a microVM is started on: master and slave."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        self.shown = b""

    def text(self) -> str:
        """Return all that it has shown by now."""
        try:
            while data := os.read(self.master, 4096):
                self.shown += data
        except BlockingIOError:
            pass
        return self.shown.decode("utf-8", "backslashreplace").replace("\r\n", "\n")

    def drill(self, jailed: JailedMicrovm, attack: str) -> str:
        """Wait for what a drill reports."""
        pattern = re.compile(rf"drill {attack}: (.*)$", re.MULTILINE)
        return str(wait_for(lambda: pattern.search(self.text()), lambda: f"{self.shown!r} {jailed.log()}")[1])


@contextmanager
def on_terminal(
    base: Path, *options: str, arguments: tuple[str, ...] = WITHOUT_CONSOLE
) -> Iterator[tuple[JailedMicrovm, Terminal]]:
    """Start a microVM on a terminal, its controlling one, where something has been typed already."""
    terminal = Terminal()
    os.write(terminal.master, b"hunter2\n")

    def lead() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    microvm_id = id_of(base, secrets.token_hex(2))
    with microvm(base, *options, arguments=arguments, microvm_id=microvm_id) as jailed:
        jailed.start(
            stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave, preexec_fn=lead
        )  # fmt: skip
        try:
            yield jailed, terminal
        finally:
            jailed.destroy()
            os.close(terminal.master)
            os.close(terminal.slave)


@pytest.mark.parametrize("role", ["", "vmm:"])
def test_what_is_typed_is_not_read(base: Path, role: str) -> None:
    with on_terminal(base, "--drill", f"{role}terminal=read", "--without", "log-pipe") as (jailed, terminal):
        assert terminal.drill(jailed, "terminal=read") == r"succeeded (b'hunter2\n')"


@pytest.mark.parametrize("role", ["", "vmm:"])
def test_what_is_typed_cannot_be_read(base: Path, role: str) -> None:
    with on_terminal(base, "--drill", f"{role}terminal=read") as (jailed, terminal):
        assert terminal.drill(jailed, "terminal=read").startswith("refused: ")
        name = "vmm" if role else "vcpu 0"
        record = jailed.wall_records()[name]
        assert record["asked"]["standard_error"] == record["found"]["standard_error"] == "log pipe"


def test_terminal_input_is_pushed_through_neither_wall(base: Path) -> None:
    """TIOCSTI: the filter ends the worker; without it, what it holds is no terminal."""
    drill = ("--drill", "terminal=push")
    with on_terminal(base, *drill) as (jailed, terminal):
        wait_for(lambda: re.search(r"vcpu 0 .*wall seccomp: ended by the filter", jailed.log()), jailed.describe)
        assert "drill terminal=push" not in terminal.text()
    with on_terminal(base, *drill, "--without", "seccomp") as (jailed, terminal):
        assert terminal.drill(jailed, "terminal=push") == "refused: Inappropriate ioctl for device (25)"
    with on_terminal(base, *drill, "--without", "seccomp", "--without", "log-pipe") as (jailed, terminal):
        outcome = terminal.drill(jailed, "terminal=push")
        legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
        refused_by_kernel = legacy.exists() and legacy.read_text() == "0\n"
        assert outcome == ("refused: Input/output error (5)" if refused_by_kernel else "succeeded (push)")


def test_control_sequences_are_shown_not_obeyed(base: Path) -> None:
    with on_terminal(base, "--drill", "terminal=control") as (jailed, terminal):
        assert terminal.drill(jailed, "terminal=control") == "succeeded (control)"
        assert "vcpu 0: \\x1b[2J\\x9b1mforged\\x0d\\xff\n" in terminal.text()
        assert "\x1b" not in terminal.text()
    with on_terminal(base, "--drill", "terminal=control", "--without", "log-pipe") as (jailed, terminal):
        terminal.drill(jailed, "terminal=control")
        assert "\x1b[2J" in terminal.text()


def test_a_flood_is_held_back(base: Path) -> None:
    with microvm(base, "--drill", "terminal=flood") as jailed:
        jailed.start().wait_up()
        wait_for(lambda: "vcpu 0 (pid " in jailed.log() and "writes too much" in jailed.log(), jailed.describe)
        assert jailed.api("GET", "/").status == 200
        jailed.stop()
        assert jailed.log().count("writes too much") == 1
        assert len(jailed.printed()) < 1 << 19  # it wrote 2.4 MiB; what a second of waiting lets through comes to it


@pytest.mark.parametrize(
    ("arguments", "held"),
    [
        (("--console", "stdio"), {0: "tty", 1: "tty"}),
        (("--console", "none"), {0: "null", 1: "write-only tty"}),
        (("--console", "none", "--log-path", "/log"), {0: "null", 1: "null"}),
    ],
)
def test_the_controller_holds_the_terminal_only_where_it_needs_it(
    base: Path, arguments: tuple[str, ...], held: dict[int, str]
) -> None:
    with on_terminal(base, arguments=arguments) as (jailed, _):
        jailed.wait_up()
        cells = jailed.wait_cells("supervisor", "vmm", "vcpu 0")
        found = {}
        for number in (0, 1):
            link = descriptors(cells["vmm"])[number]
            flags = Path(f"/proc/{cells['vmm']}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
            writes_only = int(flags, 8) & os.O_ACCMODE == os.O_WRONLY
            found[number] = "null" if link == "/dev/null" else f"{'write-only ' * writes_only}tty"
        assert found == held
        worker = descriptors(cells["vcpu 0"])
        assert worker[0] == worker[1] == "/dev/null"
        assert not any("/pts/" in link for link in worker.values())


@pytest.mark.parametrize("behaviour", ["exit-3", "segfault"])
def test_what_a_cell_wrote_is_out_before_the_end(base: Path, behaviour: str) -> None:
    jailed = stand_in(base, behaviour)
    jailed.run()
    assert jailed.printed() == "stand-in: sealed\n"


def test_a_cell_that_is_killed_is_heard(base: Path) -> None:
    jailed = stand_in(base, "idle").start()
    try:
        wait_for(lambda: "vcpu 0: stand-in: worker 0 sealed\n" in jailed.printed(), jailed.describe)
        os.kill(jailed.pid, signal.SIGTERM)
        jailed.process.wait()
        assert re.search(r"^stand-in: shutdown 143 ", jailed.printed(), re.MULTILINE)
    finally:
        jailed.destroy()
