"""The check for left-overs must see what it is there for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.harness import leftovers

ORPHAN = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leftovers, "GRACE_SECONDS", 0.2)


def test_nothing_left_passes(no_leftovers, tmp_path):
    with no_leftovers(tmp_path):
        subprocess.run([sys.executable, "-c", ""], check=True)
        (tmp_path / "file").write_text("")
        (tmp_path / "file").unlink()


def test_file_is_seen(no_leftovers, tmp_path):
    with pytest.raises(AssertionError, match=r"left behind:\n  file .*/forgotten"), no_leftovers(tmp_path):
        (tmp_path / "forgotten").write_text("")


def test_socket_is_seen(no_leftovers, tmp_path):
    server = socket.socket(socket.AF_UNIX)
    with server, pytest.raises(AssertionError, match=r"socket .*/s$"), no_leftovers(tmp_path):
        server.bind(str(tmp_path / "s"))


def test_daemonized_orphan_is_seen(no_leftovers):
    with pytest.raises(AssertionError, match=r"process (\d+) \(python") as caught, no_leftovers():
        subprocess.run([sys.executable, "-c", ORPHAN], check=True)
    pid = int(str(caught.value).split("process ")[1].split()[0])
    os.kill(pid, signal.SIGKILL)
