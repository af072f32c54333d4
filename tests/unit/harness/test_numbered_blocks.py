"""What finds a lost write finds one, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import zlib

import pytest

from tests.guests.build import build_program
from tests.harness.numbered_blocks import BLOCK, HEADER, kept, lost

THREADS, SLOTS, START = 3, 8, 100


@pytest.fixture
def disk(tmp_path):
    """A disk that the program has written to, and what it said of it."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(THREADS * SLOTS * BLOCK))
    command = [build_program("numbered"), path, str(THREADS), str(SLOTS), str(START)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        said = ""
        while min(kept(said), default=0) < START + 2 * SLOTS:
            line = program.stdout.readline()
            assert line, said
            said += line
        program.send_signal(signal.SIGTERM)
        said += program.stdout.read()
        assert program.wait(30) == 0, said
    assert said.splitlines()[-1].startswith("ended ")
    return path, kept(said)


def rewrite(path, thread, slot, number, *, writer=None, break_it=False):
    content = os.urandom(BLOCK - HEADER.size)
    rest = HEADER.pack(0, thread if writer is None else writer, number)[4:] + content
    crc = zlib.crc32(rest) ^ break_it
    with path.open("r+b") as file:
        file.seek((thread * SLOTS + slot) * BLOCK)
        file.write(crc.to_bytes(4, "little") + rest)


def test_nothing_is_lost_of_what_was_written(disk):
    path, acknowledged = disk
    assert lost(path, acknowledged, SLOTS, START, last=True) == []


def test_an_older_block_is_a_lost_write(disk):
    path, acknowledged = disk
    slot = acknowledged[1] % SLOTS
    rewrite(path, 1, slot, acknowledged[1] - SLOTS)
    assert [text.split(":")[0] for text in lost(path, acknowledged, SLOTS, START)] == [f"thread 1, slot {slot}"]


@pytest.mark.parametrize("what", ["broken", "empty", "of another thread", "of another place", "newer than the last"])
def test_other_damage_is_found(disk, what):
    path, acknowledged = disk
    slot, newest = acknowledged[2] % SLOTS, acknowledged[2]
    if what == "empty":
        with path.open("r+b") as file:
            file.seek((2 * SLOTS + slot) * BLOCK)
            file.write(bytes(BLOCK))
    else:
        number = newest + {"of another place": 1, "newer than the last": SLOTS}.get(what, 0)
        writer = 0 if what == "of another thread" else None
        rewrite(path, 2, slot, number, writer=writer, break_it=what == "broken")
    assert len(lost(path, acknowledged, SLOTS, START, last=True)) == 1


def test_a_newer_block_is_right_while_the_program_was_running(disk):
    path, acknowledged = disk
    rewrite(path, 0, acknowledged[0] % SLOTS, acknowledged[0] + SLOTS)
    assert lost(path, acknowledged, SLOTS, START) == []


def test_the_last_whole_line_counts():
    assert kept("kept 1 2\nkept 3 4\nkept 5") == [3, 4]
    assert kept("kept 1 2\nended 7 8\n") == [7, 8]
    assert kept("") == []
    with pytest.raises(AssertionError, match="failed write"):
        kept("kept 1 2\nfailed write: Input/output error\n")
