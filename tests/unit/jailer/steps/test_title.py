"""What /proc shows as the arguments of a process, read back by another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
_SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1]]
from jailer.steps.title import TITLE
TITLE.find("firecracker")
exec(sys.stdin.readline())
print("shown", flush=True)
sys.stdin.readline()
"""


def shown(statement: str, *padding: str) -> bytes:
    """Run a statement in a process with this much room for arguments; return its command line."""
    command = [sys.executable, "-S", "-c", _SCRIPT, str(ROOT), *padding]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{statement}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "shown\n"
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.stdin.close()
    assert process.returncode == 0
    return command_line


def test_a_role_is_one_text_without_anything_behind_it() -> None:
    assert shown("TITLE.show_role('vcpu 0')") == b"firecracker: vcpu 0\0"


def test_a_role_may_be_shown_over_another() -> None:
    statement = "TITLE.show_role('something long'); TITLE.show_role('vmm')"
    assert shown(statement, "x" * 100) == b"firecracker: vmm\0"


def test_arguments_are_words() -> None:
    line = shown("TITLE.show_arguments(['--api-sock', '/a b', '', '--id', 'é'])")
    assert line.rstrip(b"\0") == "firecracker\0--api-sock\0/a b\0\0--id\0é".encode()


def test_a_fork_that_has_a_role_after_arguments_shows_the_role() -> None:
    assert shown("TITLE.show_arguments(['--id', 'x']); TITLE.show_role('vmm')") == b"firecracker: vmm\0"


@pytest.mark.parametrize("statement", ["TITLE.show_arguments(['x' * 100000, 'y'])", "TITLE.show_arguments([])"])
def test_what_does_not_fit_is_left_out(statement: str) -> None:
    assert shown(statement).rstrip(b"\0") == b"firecracker"


def test_a_role_that_does_not_fit_is_cut_off() -> None:
    line = shown("TITLE.show_role('r' * 100000)")
    assert line.startswith(b"firecracker: rrr")
    assert line.endswith(b"r\0")


def test_before_the_place_is_known_nothing_is_written() -> None:
    never_found = "t = type(TITLE)(); t.program = 'nobody'; "
    assert b"nobody: vmm" not in shown(never_found + "t.show_role('vmm'); t.show_arguments(['y'])")
