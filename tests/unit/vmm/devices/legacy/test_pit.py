"""The 8254 against its data sheet: modes, gates, accesses, latches, port 0x61; and when it needs a host's timer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.legacy.pit import (
    FREQUENCY_HZ,
    LISTENING,
    MASKED,
    MAX_BACKLOG,
    MIN_INTERVAL_NS,
    SPEAKER,
    WAITING,
    Pit,
    PitState,
)

SECOND = 1_000_000_000
CONTROL = 3
BOTH = 0x30


class Bench:
    """A PIT with a clock that only the test moves, and the timer that it asks for."""

    def __init__(self, state: PitState | None = None, now: int = 5 * SECOND) -> None:
        self.now = now
        self.reach = LISTENING
        self.interrupts: list[int] = []
        self.deadline: int | None = None
        self.set_count = 0
        self.pit = Pit(
            lambda: self.interrupts.append(self.now), lambda: self.reach, self._schedule, lambda: self.now, state=state
        )
        self.pit.update()

    def _schedule(self, deadline: int | None) -> None:
        self.deadline = deadline
        self.set_count += 1

    def write(self, offset: int, *values: int) -> None:
        for value in values:
            assert self.pit.write(offset, 1, value) is None

    def read(self, offset: int) -> int:
        return self.pit.read(offset, 1)

    def program(self, counter: int, mode: int, count: int, *, access: int = BOTH, bcd: bool = False) -> None:
        self.write(CONTROL, counter << 6 | access | mode << 1 | bcd)
        self.write(counter, *{0x10: (count & 0xFF,), 0x20: (count >> 8,), BOTH: (count & 0xFF, count >> 8)}[access])

    def count(self, counter: int) -> int:
        return self.read(counter) | self.read(counter) << 8

    def out(self, counter: int) -> bool:
        """The output, by the read-back command."""
        self.write(CONTROL, 0xE0 | 2 << counter)
        return bool(self.read(counter) & 0x80)

    def tick(self, ticks: int) -> None:
        """Let so many ticks pass, and a little of the next one; no timer fires meanwhile."""
        self.now += -(-ticks * SECOND // FREQUENCY_HZ) + 1

    def run(self, nanoseconds: int) -> None:
        """Let time pass, and timers fire."""
        end = self.now + nanoseconds
        while self.deadline is not None and self.deadline <= end:
            self.now = max(self.now, self.deadline)
            self.deadline = None
            self.pit.fire()
        self.now = end


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---------------------------------------------------------------- modes (counter 2 where the gate matters)


def outputs(bench: Bench, ticks: int, counter: int = 2) -> str:
    """The output over some ticks, a digit each."""
    shown = ""
    for _ in range(ticks):
        shown += str(int(bench.out(counter)))
        bench.tick(1)
    return shown


def gate(bench: Bench, *, high: bool) -> None:
    bench.write(SPEAKER, int(high))


@pytest.mark.parametrize(
    ("mode", "count", "shown"),
    [
        (0, 4, "000011111111"),  # low until the count is over, high for good
        (2, 4, "111011101110"),  # low for one tick before it begins anew
        (3, 4, "110011001100"),  # half and half
        (3, 5, "111001110011"),  # odd: the longer half is high
        (4, 4, "111101111111"),  # low for one tick
        (6, 4, "111011101110"),  # 6 and 7 are 2 and 3
        (7, 4, "110011001100"),
    ],
)
def test_outputs_of_modes_that_begin_by_themselves(bench, mode, count, shown):
    gate(bench, high=True)
    bench.program(2, mode, count)
    assert outputs(bench, 12) == shown


@pytest.mark.parametrize(("mode", "shown"), [(1, "000011111111"), (5, "111101111111")])
def test_outputs_of_modes_that_the_gate_triggers(bench, mode, shown):
    bench.program(2, mode, 4)
    assert outputs(bench, 3) == "111"
    gate(bench, high=True)
    assert outputs(bench, 12) == shown
    gate(bench, high=False)  # that stops nothing
    gate(bench, high=True)
    assert outputs(bench, 2) == shown[:2]
    gate(bench, high=False)
    gate(bench, high=True)  # triggered again before the end
    assert outputs(bench, 12) == shown


@pytest.mark.parametrize(("mode", "before", "after"), [(0, "00", "0011"), (4, "11", "1101")])
def test_a_low_gate_stops_counting(bench, mode, before, after):
    gate(bench, high=True)
    bench.program(2, mode, 4)
    assert outputs(bench, 2) == before
    gate(bench, high=False)
    stopped = bench.count(2)
    bench.tick(1000)
    assert (bench.count(2), stopped) == (2, 2)
    gate(bench, high=True)
    assert outputs(bench, 4) == after


@pytest.mark.parametrize("mode", [2, 3])
def test_a_low_gate_holds_a_periodic_output_high_and_its_rise_reloads(bench, mode):
    gate(bench, high=True)
    bench.program(2, mode, 100)
    bench.tick(99)
    assert not bench.out(2)
    gate(bench, high=False)
    assert bench.out(2)
    bench.tick(50)
    assert bench.out(2)
    gate(bench, high=True)
    assert bench.count(2) == 100


@pytest.mark.parametrize(
    ("mode", "ticks", "value"),
    [
        (0, 0, 1000),
        (0, 1, 999),
        (0, 1001, 0xFFFF),
        (2, 999, 1),
        (2, 1000, 1000),
        (3, 1, 998),
        (3, 500, 1000),
        (4, 3, 997),
    ],
)
def test_counting(bench, mode, ticks, value):
    bench.program(0, mode, 1000)
    bench.tick(ticks)
    assert bench.count(0) == value


def test_a_count_of_0_is_the_largest(bench):
    bench.program(0, 2, 0)
    bench.tick(1)
    assert bench.count(0) == 0xFFFF
    bench.tick(0xFFFF)
    assert bench.count(0) == 0


def test_decimal_counting(bench):
    bench.program(0, 0, 0x1000, bcd=True)
    bench.tick(1)
    assert bench.count(0) == 0x0999
    bench.tick(1000)
    assert bench.count(0) == 0x9999
    bench.program(0, 2, 0, bcd=True)
    bench.tick(1)
    assert bench.count(0) == 0x9999


# ---------------------------------------------------------------- accesses and latches


@pytest.mark.parametrize(("access", "written", "count"), [(0x10, 0x0034, 0x34), (0x20, 0x1200, 0x12)])
def test_one_byte_accesses(bench, access, written, count):
    bench.program(0, 2, written, access=access)
    assert bench.read(0) == count
    assert bench.read(0) == count


def test_the_first_byte_stops_mode_0_and_no_other(bench):
    gate(bench, high=True)
    bench.program(2, 0, 10)
    bench.tick(11)
    bench.write(2, 20)
    assert not bench.out(2)
    bench.tick(100)
    bench.write(2, 0)
    bench.tick(20)
    assert bench.out(2)
    bench.program(2, 2, 1000)
    bench.tick(10)
    bench.write(2, 1)
    assert bench.count(2) == 990


def test_a_latched_count_stays_until_both_bytes_were_read(bench):
    bench.program(0, 2, 0x1234)
    bench.write(CONTROL, 0x00)
    bench.tick(100)
    bench.write(CONTROL, 0x00)  # a second latch does nothing
    assert bench.read(0) == 0x34
    bench.tick(100)
    assert bench.read(0) == 0x12
    assert bench.count(0) == 0x1234 - 200


def test_read_back_latches_several_counters_status_first(bench):
    bench.program(0, 2, 0x1234)
    bench.program(2, 3, 0x20, access=0x10)
    bench.write(CONTROL, 0xC0 | 2 | 8)
    bench.tick(1)
    assert [bench.read(0), bench.read(0), bench.read(0)] == [0x80 | BOTH | 2 << 1, 0x34, 0x12]
    assert [bench.read(2), bench.read(2)] == [0x80 | 0x10 | 3 << 1, 0x20]
    assert bench.read(0) == 0x33


def test_the_status_tells_a_count_that_is_missing(bench):
    bench.write(CONTROL, 0x34)
    bench.write(CONTROL, 0xE2)
    assert bench.read(0) & 0x40
    bench.write(0, 1, 1)
    bench.write(CONTROL, 0xE2)
    assert not bench.read(0) & 0x40


def test_a_control_word_begins_anew(bench):
    """A byte that was written or read of a pair is forgotten, and so is a latch."""
    bench.program(0, 2, 0x1234)
    bench.write(CONTROL, 0x00)
    bench.read(0)
    bench.write(0, 0x77)
    bench.program(0, 2, 0x4321)
    assert bench.count(0) == 0x4321


def test_the_control_register_cannot_be_read_and_wide_accesses_count_as_a_byte(bench):
    assert bench.read(CONTROL) == 0
    bench.pit.write(CONTROL, 4, 0xFFFF_FF34)
    bench.pit.write(0, 2, 0xFF01)
    bench.pit.write(0, 2, 0xFF01)
    assert bench.count(0) == 0x101


# ---------------------------------------------------------------- port 0x61


def test_port_0x61(bench):
    """Bits 0 and 1 are what was written, 4 changes all the time, 5 is the output of counter 2."""
    bench.write(SPEAKER, 0xFF)
    assert bench.read(SPEAKER) & 0xCF == 0x03
    bench.program(2, 0, 100)
    assert not bench.read(SPEAKER) & 0x20
    bench.tick(101)
    assert bench.read(SPEAKER) & 0x20
    seen = set()
    for _ in range(4):
        seen.add(bench.read(SPEAKER) & 0x10)
        bench.now += 1 << 14
    assert seen == {0, 0x10}
    bench.write(SPEAKER, 0)
    assert bench.read(SPEAKER) & 0xCF == 0


# ---------------------------------------------------------------- interrupts


def test_a_periodic_counter_interrupts_in_time_for_ever(bench):
    bench.program(0, 2, 1193)
    start = bench.now
    bench.run(SECOND)
    expected = FREQUENCY_HZ // 1193
    assert len(bench.interrupts) == expected
    assert [moment - start for moment in bench.interrupts] == [
        -(-number * 1193 * SECOND // FREQUENCY_HZ) for number in range(1, expected + 1)
    ]


@pytest.mark.parametrize(("mode", "ticks"), [(0, 1000), (4, 1001)])
def test_a_one_shot_interrupts_once(bench, mode, ticks):
    bench.program(0, mode, 1000)
    start = bench.now
    bench.run(SECOND)
    assert [moment - start for moment in bench.interrupts] == [-(-ticks * SECOND // FREQUENCY_HZ)]
    assert bench.deadline is None
    bench.write(0, 0xE8, 3)  # the next count begins the next one
    bench.run(SECOND)
    assert len(bench.interrupts) == 2


@pytest.mark.parametrize("mode", [1, 5])
def test_what_only_a_gate_triggers_never_interrupts(bench, mode):
    """The gate of counter 0 is wired high."""
    bench.program(0, mode, 10)
    bench.run(SECOND)
    assert (bench.interrupts, bench.deadline, bench.set_count) == ([], None, 0)


def test_a_control_word_stops_it(bench):
    bench.program(0, 2, 1193)
    bench.write(CONTROL, 0x30)
    assert bench.deadline is None
    bench.run(SECOND)
    assert bench.interrupts == []


def test_other_counters_need_no_timer(bench):
    gate(bench, high=True)
    for counter in (1, 2):
        bench.program(counter, 2, 100)
    assert bench.set_count == 0


@pytest.mark.parametrize("reach", [MASKED, WAITING])
def test_without_a_listener_there_is_no_timer(bench, reach):
    bench.reach = reach
    bench.program(0, 2, 1193)
    bench.pit.update()
    assert bench.set_count == 0
    bench.reach = LISTENING
    bench.pit.update()
    assert bench.deadline is not None
    bench.reach = reach
    bench.pit.update()
    assert bench.deadline is None


def test_of_what_was_masked_one_edge_is_left(bench):
    bench.reach = MASKED
    bench.program(0, 2, 1193)
    bench.run(SECOND)
    bench.reach = LISTENING
    bench.pit.update()
    bench.run(0)
    assert len(bench.interrupts) == 1
    bench.run(900_000)  # less than a period
    assert len(bench.interrupts) <= 2


def test_edges_that_were_waited_for_are_made_up_one_by_one(bench):
    """Each after the acknowledgement of the one before; MAX_BACKLOG at most, MIN_INTERVAL_NS apart."""
    bench.program(0, 2, 11932)  # 10 ms
    bench.run(10_500_000)
    assert len(bench.interrupts) == 1
    bench.reach = WAITING
    bench.pit.update()
    bench.run(50_000_000)
    assert len(bench.interrupts) == 1
    bench.reach = LISTENING
    bench.pit.update()
    bench.run(MIN_INTERVAL_NS * 6)
    assert len(bench.interrupts) == 6
    bench.reach = WAITING
    bench.pit.update()
    bench.run(100 * SECOND)
    bench.reach = LISTENING
    bench.pit.update()
    before = len(bench.interrupts)
    bench.run(9_000_000)
    assert MAX_BACKLOG <= len(bench.interrupts) - before <= MAX_BACKLOG + 2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_guest_cannot_ask_for_more_than_the_bound(bench, count):
    bench.program(0, 2, count)
    bench.run(100_000_000)
    assert len(bench.interrupts) <= 100_000_000 // MIN_INTERVAL_NS + 1
    gaps = [after - before for before, after in zip(bench.interrupts, bench.interrupts[1:], strict=False)]
    assert min(gaps) >= MIN_INTERVAL_NS


# ---------------------------------------------------------------- state, and at random


def test_saved_and_restored_it_goes_on_as_before(bench):
    gate(bench, high=True)
    bench.program(0, 2, 11932)
    bench.program(2, 3, 0x1234)
    bench.run(25_000_000)
    bench.write(CONTROL, 0xC4)
    saved = bench.pit.save()
    other = Bench(saved, now=77 * SECOND)
    assert other.pit.save() == saved
    assert bench.deadline is not None
    assert other.deadline is not None
    assert bench.deadline - bench.now == pytest.approx(other.deadline - other.now, abs=2)
    assert [other.read(2), other.read(2)] == [bench.read(2), bench.read(2)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 4), st.integers(0, 255)),
        st.tuples(st.just("read"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("reach"), st.sampled_from([MASKED, WAITING, LISTENING]), st.just(0)),
        st.tuples(st.just("run"), st.integers(0, 200_000_000), st.just(0)),
    ),
    max_size=40,
)


@given(STEPS)
def test_random_accesses(steps):
    """No exception; values and state in their bounds; never a timer for what nobody listens to, never too soon."""
    bench = Bench()
    for what, number, value in steps:
        if what == "write":
            bench.write(number, value)
        elif what == "read":
            assert 0 <= bench.read(number) <= 0xFF
        elif what == "reach":
            bench.reach = number
            bench.pit.update()
        else:
            bench.run(number)
        assert bench.deadline is None or bench.reach == LISTENING
        for counter in bench.pit.counters:
            assert 1 <= counter.cycle <= 65536
            assert 0 <= counter.value(bench.now) <= 65536
            counter.out(bench.now)
    gaps = [after - before for before, after in zip(bench.interrupts, bench.interrupts[1:], strict=False)]
    assert all(gap >= MIN_INTERVAL_NS for gap in gaps)
    saved = bench.pit.save()
    assert Bench(saved).pit.save() == saved
