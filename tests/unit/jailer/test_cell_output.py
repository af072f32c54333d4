"""What cells write to standard error: whole lines, escaped, labelled, and no more than they may."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.launch_plan import LaunchPlan
from jailer import cell_output
from jailer.cell_output import BURST, BYTES_PER_S, LAST_WORDS, MAX_LINE, CellOutput, escape


def _plan(**changed: object) -> LaunchPlan:
    # fmt: off
    plan = LaunchPlan("id", 1, True, 5, 6, (), 0, 0, 0, 1, 1 << 20, "split", "", "kill", (), (), (), "/a", "/b", -1, -1)
    # fmt: on
    return plan._replace(**changed)  # type: ignore[arg-type]


class Ends:
    """Both ends of a pipe, and a clock."""

    def __init__(self, label: str = "vcpu 0: ") -> None:
        self.now = 0.0
        read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.output = CellOutput(read_end, label, lambda: self.now)

    def say(self, data: bytes) -> list[str]:
        os.write(self.write_end, data)
        return self.output.read()

    def hang_up(self) -> None:
        os.close(self.write_end)
        self.write_end = -1


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.output.close()
    if made.write_end >= 0:
        made.hang_up()


def test_lines_are_whole_and_have_the_name_of_the_cell(ends: Ends) -> None:
    assert ends.output.read() == []
    assert ends.say(b"one\ntw") == ["vcpu 0: one"]
    assert ends.say(b"o\n\nthree") == ["vcpu 0: two", "vcpu 0: "]
    ends.hang_up()
    assert ends.output.drain() == ["vcpu 0: three"]
    assert ends.output.descriptor == -1
    assert ends.output.read() == ends.output.drain() == []


def test_a_cell_that_closes_its_end_is_not_waited_for(ends: Ends) -> None:
    ends.hang_up()
    assert ends.output.read() == []
    assert not ends.output.is_due()
    assert not ends.output.is_held()


def test_a_terminal_only_shows_it(ends: Ends) -> None:
    text = "\x1b[2J\r\t\u2028\u202e\x9b"
    assert ends.say(text.encode() + b"\xff\x00\n") == [r"vcpu 0: \x1b[2J\x0d\x09\u2028\u202e\x9b\xff\x00"]


@given(st.binary())
def test_escaped_text_is_printable(data: bytes) -> None:
    shown = escape(data)
    assert not any(ord(each) < 32 or 0x7F <= ord(each) < 0xA0 for each in shown)
    assert shown.encode().isascii() or not data.isascii()


@given(st.lists(st.binary(max_size=3 * MAX_LINE), max_size=8))
def test_nothing_is_lost_however_it_comes(chunks: list[bytes]) -> None:
    made = Ends("")
    lines = []
    for chunk in chunks:
        made.now += 3600
        lines += made.say(chunk) if chunk else []
    made.hang_up()
    lines += made.output.drain()
    whole = b"".join(chunks)
    assert "".join(lines) == "".join(map(escape, _pieces(whole)))
    assert all(len(line) <= 4 * MAX_LINE for line in lines)


def _pieces(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return [line[at : at + MAX_LINE] for line in lines for at in range(0, len(line), MAX_LINE)]


def test_a_flood_is_held_back_and_costs_nothing_meanwhile(ends: Ends) -> None:
    line = b"x" * 99 + b"\n"
    flood = line * 600
    os.write(ends.write_end, flood)
    taken = len(ends.output.read())
    os.write(ends.write_end, flood)
    taken += sum(len(ends.output.read()) for _ in range(1000))
    assert 100 * taken <= BURST < 100 * (taken + 7)
    assert ends.output.limited
    assert ends.output.is_held()
    assert not ends.output.is_due()
    ends.now += ends.output.wait()
    assert ends.output.is_due()
    ends.now += 0.9
    assert 0 < len(ends.output.read()) * 100 <= BYTES_PER_S + 512
    ends.hang_up()
    assert (LAST_WORDS // 100) - 1 <= len(ends.output.drain()) <= (LAST_WORDS // 100) + 2


def test_the_pipe_is_made_unless_its_wall_is_off() -> None:
    pipe = cell_output.LogPipe(_plan(switched_off=("log-pipe",)))
    assert pipe.take("x") is None
    pipe.become_standard_error()
    pipe.close()
    before = os.listdir("/proc/self/fd")
    pipe = cell_output.LogPipe(_plan())
    pipe.close()
    assert os.listdir("/proc/self/fd") == before


def test_lines_that_nobody_reads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    monkeypatch.setattr(cell_output, "_STANDARD_ERROR", write_end)
    lost = cell_output.write(["y" * 5000] * 100)
    assert os.read(read_end, 4096) == b"y" * 4092 + b"...\n"
    assert 0 < lost < 100
    os.close(read_end)
    assert cell_output.write(["z"]) == 1
    os.close(write_end)
