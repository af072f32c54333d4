"""Threads that a limit refuses are an error that can be told, and trying for room leaves none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from base import threads

ROOT = Path(__file__).resolve().parents[3]
#: Run by a user of its own, who has one process and may have no more.
_LIMITED = """
import os, resource, sys
sys.path[:0] = [sys.argv[1]]
from base import threads
from base.errors import ThreadError
resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[2]), int(sys.argv[2])))
os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)
try:
    threads.check_room(int(sys.argv[3]))
    print("room")
except ThreadError as error:
    print(error)
"""


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_room_for_threads_leaves_none(count: int) -> None:
    before = _tasks()
    threads.check_room(count)
    assert _tasks() == before


def test_a_thread_gets_its_arguments() -> None:
    done = threading.Event()
    seen: list[object] = []

    def note(*arguments: object) -> None:
        seen.append(arguments)
        done.set()

    threads.start(note, 1, "two")
    assert done.wait(30)
    assert seen == [(1, "two")]


@pytest.mark.parametrize(("limit", "count", "fits"), [(3, 2, True), (2, 2, False), (1, 1, False), (1, 0, True)])
def test_a_limit_is_named(limit: int, count: int, fits: bool) -> None:
    command = [sys.executable, "-S", "-c", _LIMITED, str(ROOT), str(limit), str(count)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    if fits:
        assert said == "room"
    else:
        assert said.startswith("no thread can be made: Resource temporarily unavailable (os error 11): raise the limit")
        assert "pids.max" in said


def test_only_a_limit_gets_the_advice() -> None:
    assert threads.ADVICE in threads.explain(BlockingIOError(11, ""))
    assert threads.explain(FileNotFoundError(2, "")) == "No such file or directory (os error 2)"


def test_a_library_says_its_last_words_to_who_reports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr(threads.MadeByLibrary, "last_words", theirs)
    before = os.readlink("/proc/self/fd/2"), len(os.listdir("/proc/self/fd"))
    with threads.MadeByLibrary(2):
        os.write(2, b"gone")
    assert os.read(ours, 100) == b"gone"
    assert (os.readlink("/proc/self/fd/2"), len(os.listdir("/proc/self/fd"))) == before
    os.close(ours)
    os.close(theirs)
