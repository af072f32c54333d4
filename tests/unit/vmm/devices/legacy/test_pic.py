"""The 8259 pair against its data sheet: initialisation, priorities, ends of interrupt, cascade, poll; and at random."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm.devices.legacy.pic import ELCR, SLAVE, Pic

MASTER, MASTER_DATA, SLAVE_DATA = 0, 1, SLAVE + 1
EOI = 0x20
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SET_SPECIAL_MASK, CLEAR_SPECIAL_MASK = 0x68, 0x48


class Pair:
    """The chips, with what they told: how often INT rose, how often masks may have changed."""

    def __init__(self, icw4: int = 1, slave_icw4: int = 1, *, ready: bool = True) -> None:
        self.rises = 0
        self.changes = 0
        self.pic = Pic(self._rose, self._changed)
        if ready:
            for offset, base, wiring, last in ((MASTER, 0x20, 4, icw4), (SLAVE, 0x28, 2, slave_icw4)):
                self.write(offset, 0x11)
                for value in (base, wiring, last):
                    self.write(offset + 1, value)

    def _rose(self) -> None:
        self.rises += 1

    def _changed(self) -> None:
        self.changes += 1

    def write(self, offset: int, *values: int) -> None:
        for value in values:
            assert self.pic.write(offset, 1, value) is None

    def read(self, offset: int) -> int:
        return self.pic.read(offset, 1)

    def register(self, command: int, offset: int = MASTER) -> int:
        self.write(offset, command)
        return self.read(offset)

    def pulse(self, *numbers: int) -> None:
        for number in numbers:
            self.pic.pulse(number)

    def take(self) -> int | None:
        """Do what a processor does that can be interrupted."""
        return self.pic.acknowledge() if self.pic.output else None

    def take_all(self, end: int | None = None) -> list[int]:
        """Take interrupts until there is none; with ``end`` that command follows each, to the master."""
        taken = []
        while (vector := self.take()) is not None:
            taken.append(vector)
            if end is not None:
                self.write(MASTER, end)
        return taken


# ---------------------------------------------------------------- initialisation


def test_before_initialisation_it_asks_for_nothing_and_keeps_its_mask():
    pair = Pair(ready=False)
    pair.write(MASTER_DATA, 0xA5)
    pair.write(SLAVE_DATA, 0x5A)
    pair.pulse(*range(16))
    assert (pair.read(MASTER_DATA), pair.read(SLAVE_DATA)) == (0xA5, 0x5A)
    assert (pair.pic.output, pair.rises, pair.register(READ_IRR)) == (False, 0, 0)


@pytest.mark.parametrize(
    ("icw1", "words", "base"),
    [
        (0x11, (0x47, 0x04, 0x01), 0x40),  # the low three bits of ICW2 do not count
        (0x10, (0x48, 0x04), 0x48),  # no ICW4
        (0x13, (0x50, 0x01), 0x50),  # single: no ICW3
        (0x12, (0x58,), 0x58),  # neither
    ],
)
def test_initialisation_words(icw1, words, base):
    """After as many as ICW1 says the next write is the mask."""
    pair = Pair()
    pair.write(MASTER_DATA, 0xFF)
    pair.write(MASTER, icw1)
    for number, word in enumerate(words):
        assert not pair.pic.master.ready
        pair.pulse(3)  # none is taken meanwhile
        assert not pair.pic.output, number
        pair.write(MASTER_DATA, word)
    assert pair.read(MASTER_DATA) == 0  # ICW1 clears the mask
    pair.write(MASTER_DATA, 0x01)
    assert pair.read(MASTER_DATA) == 0x01
    pair.pulse(5)
    assert pair.take() == base + 5


def test_icw1_resets_requests_service_priorities_and_modes():
    pair = Pair()
    pair.write(MASTER_DATA, 0xF0)
    pair.pulse(1, 2)
    assert pair.take() == 0x21
    pair.write(MASTER, 0xC2, SET_SPECIAL_MASK, READ_ISR)
    pair.write(MASTER, 0x11)
    assert not pair.pic.output
    pair.write(MASTER_DATA, 0x20, 4, 1)
    assert [pair.read(MASTER), pair.register(READ_ISR), pair.read(MASTER_DATA)] == [0, 0, 0]
    pair.pulse(7, 0)
    assert pair.take() == 0x20
    assert not pair.pic.master.special_mask


def test_no_icw4_takes_automatic_end_of_interrupt_back():
    pair = Pair(icw4=0x13)
    assert (pair.pic.master.auto_eoi, pair.pic.master.special_fully_nested) == (True, True)
    pair.write(MASTER, 0x10)
    pair.write(MASTER_DATA, 0x20, 4)
    assert (pair.pic.master.auto_eoi, pair.pic.master.special_fully_nested) == (False, False)


# ---------------------------------------------------------------- priorities and ends of interrupt


def test_the_lowest_input_comes_first_and_blocks_the_others_until_its_end():
    pair = Pair()
    pair.pulse(6, 1, 4)
    assert pair.rises == 1
    assert pair.take() == 0x21
    assert (pair.pic.output, pair.register(READ_ISR), pair.register(READ_IRR)) == (False, 0x02, 0x50)
    pair.pulse(0)  # a higher one interrupts its handler
    assert pair.take() == 0x20
    pair.write(MASTER, EOI)
    assert (pair.take(), pair.register(READ_ISR)) == (None, 0x02)
    pair.write(MASTER, EOI)
    assert pair.take_all(EOI) == [0x24, 0x26]


def test_one_that_is_in_service_waits_for_its_own_end():
    pair = Pair()
    pair.pulse(3)
    assert pair.take() == 0x23
    pair.pulse(3)
    assert pair.take() is None
    pair.write(MASTER, EOI)
    assert pair.take() == 0x23


def test_masked_requests_are_kept():
    pair = Pair()
    pair.write(MASTER_DATA, 0x10)
    pair.pulse(4)
    assert (pair.pic.output, pair.register(READ_IRR)) == (False, 0x10)
    pair.write(MASTER_DATA, 0x00)
    assert pair.take() == 0x24


def test_a_request_that_is_masked_before_it_was_taken_lowers_the_line():
    pair = Pair()
    pair.pulse(4)
    assert pair.pic.output
    pair.write(MASTER_DATA, 0x10)
    assert not pair.pic.output


@pytest.mark.parametrize(
    ("command", "served", "left", "lowest"),
    [
        (0x20, (3, 5), 0x20, 7),  # unspecific: the highest in service
        (0x65, (3, 5), 0x08, 7),  # specific
        (0xA0, (3, 5), 0x20, 3),  # rotate on the unspecific one
        (0xE5, (3, 5), 0x08, 5),  # rotate on a specific one
        (0xC4, (3, 5), 0x28, 4),  # set priority: ends nothing
        (0x40, (3, 5), 0x28, 7),  # no operation
        (0xA0, (), 0x00, 7),  # nothing to end: nothing rotates
    ],
)
def test_operation_commands(command, served, left, lowest):
    pair = Pair()
    for number in sorted(served, reverse=True):
        pair.pulse(number)
        assert pair.take() == 0x20 + number
    pair.write(MASTER, command)
    assert (pair.register(READ_ISR), pair.pic.master.lowest) == (left, lowest)


@pytest.mark.parametrize("lowest", range(8))
def test_after_the_lowest_one_comes_the_highest(lowest):
    pair = Pair()
    pair.write(MASTER, 0xC0 | lowest)
    inputs = [number for number in range(8) if number != 2]
    pair.pulse(*inputs)
    order = sorted(inputs, key=lambda number: (number - lowest - 1) % 8)
    assert pair.take_all(EOI) == [0x20 + number for number in order]


def test_automatic_end_of_interrupt():
    pair = Pair(icw4=0x03)
    pair.pulse(3, 3, 1)
    assert pair.take_all() == [0x21, 0x23]
    assert pair.register(READ_ISR) == 0


def test_automatic_rotation():
    """With automatic end of interrupt: whoever was served comes last, until that is switched off."""
    pair = Pair(icw4=0x03)
    pair.write(MASTER, 0x80)
    pair.pulse(0, 1)
    assert pair.take() == 0x20
    pair.pulse(0)
    assert pair.take_all() == [0x21, 0x20]
    pair.write(MASTER, 0x00)
    pair.pulse(7)
    assert pair.take() == 0x27
    assert pair.pic.master.lowest == 0


def test_special_mask_mode():
    """A handler that masks its own input lets lower ones in; an unspecific end does not end it, a specific one does."""
    pair = Pair()
    pair.pulse(1)
    assert pair.take() == 0x21
    pair.pulse(6)
    assert pair.take() is None
    pair.write(MASTER_DATA, 0x02)
    pair.write(MASTER, SET_SPECIAL_MASK)
    assert pair.take() == 0x26
    pair.write(MASTER, EOI)
    assert pair.register(READ_ISR) == 0x02
    pair.write(MASTER, EOI)
    assert pair.register(READ_ISR) == 0x02
    pair.write(MASTER, 0x61)
    assert pair.register(READ_ISR) == 0
    pair.write(MASTER, 0x08)  # neither bit: nothing changes
    assert pair.pic.master.special_mask
    pair.write(MASTER, CLEAR_SPECIAL_MASK)
    assert not pair.pic.master.special_mask


# ---------------------------------------------------------------- the slave


def test_the_slave_answers_for_its_inputs():
    pair = Pair()
    pair.pulse(12, 8)
    assert pair.take() == 0x28
    assert (pair.register(READ_ISR), pair.register(READ_ISR, SLAVE)) == (0x04, 0x01)
    pair.write(SLAVE, EOI)
    assert pair.take() is None  # the master still serves the slave
    pair.write(MASTER, EOI)
    assert pair.take() == 0x2C


def test_the_slave_ranks_between_inputs_1_and_3():
    pair = Pair()
    pair.pulse(3, 15, 1)
    taken = []
    while (vector := pair.take()) is not None:
        taken.append(vector)
        if vector >= 0x28:
            pair.write(SLAVE, EOI)
        pair.write(MASTER, EOI)
    assert taken == [0x21, 0x2F, 0x23]


@pytest.mark.parametrize(("icw4", "second"), [(0x01, None), (0x11, 0x29)])
def test_special_fully_nested_mode(icw4, second):
    """A higher input of the slave interrupts the handler of a lower one only in that mode."""
    pair = Pair(icw4=icw4)
    pair.pulse(13)
    assert pair.take() == 0x2D
    pair.pulse(9)
    assert pair.take() == second


def test_what_the_slave_takes_back_is_no_request_of_the_master():
    pair = Pair()
    pair.pulse(14)
    assert pair.pic.output
    pair.write(SLAVE_DATA, 0x40)
    assert (pair.pic.output, pair.register(READ_IRR)) == (False, 0)
    pair.write(SLAVE_DATA, 0)
    assert pair.take() == 0x2E


def test_a_single_master_has_an_input_2_of_its_own():
    pair = Pair()
    pair.write(MASTER, 0x13)
    pair.write(MASTER_DATA, 0x20, 0x01)
    pair.pulse(9)
    assert not pair.pic.output
    pair.pulse(2)
    assert pair.take() == 0x22


# ---------------------------------------------------------------- spurious, poll, ELCR, accesses


def test_without_a_request_the_vector_is_that_of_input_7():
    pair = Pair()
    assert pair.pic.acknowledge() == 0x27
    assert pair.register(READ_ISR) == 0
    assert pair.pic.slave.acknowledge() == 7  # 15, for the pair
    assert pair.register(READ_ISR, SLAVE) == 0


def test_poll():
    """The read after the command acknowledges, whichever port it reads; without a request bit 7 is clear."""
    pair = Pair()
    assert pair.register(POLL) == 0x00
    pair.pulse(5)
    assert pair.register(POLL) == 0x85
    assert (pair.pic.output, pair.register(READ_ISR), pair.register(READ_IRR)) == (False, 0x20, 0)
    pair.write(MASTER, EOI)
    pair.pulse(6)
    pair.write(MASTER, POLL)
    assert pair.read(MASTER_DATA) == 0x86
    assert pair.read(MASTER_DATA) == 0
    pair.write(MASTER, EOI)
    pair.pulse(10)
    assert (pair.register(POLL), pair.register(POLL, SLAVE)) == (0x82, 0x82)


def test_level_registers_hold_what_can_be_level_triggered():
    pair = Pair()
    pair.write(ELCR, 0xFF)
    pair.write(ELCR + 1, 0xFF)
    assert (pair.read(ELCR), pair.read(ELCR + 1)) == (0xF8, 0xDE)
    pair.pulse(5)  # our devices give edges, whatever it says
    assert pair.take() == 0x25


def test_wide_accesses_count_as_their_low_byte():
    pair = Pair()
    pair.pic.write(MASTER_DATA, 4, 0x1234_56A5)
    assert pair.pic.read(MASTER_DATA, 4) == 0xA5


def test_masks_and_requests_that_others_ask_for():
    """A timer runs only while its edge could come through (vmm.devices.manager)."""
    pair = Pair(ready=False)
    assert pair.pic.is_masked(0)
    pair = Pair()
    assert not pair.pic.is_masked(0)
    changes = pair.changes
    pair.write(MASTER_DATA, 0x01)
    assert pair.pic.is_masked(0)
    assert pair.changes == changes + 1
    pair.write(MASTER_DATA, 0)
    pair.pulse(0)
    assert pair.pic.is_waiting(0)
    pair.take()
    assert not pair.pic.is_waiting(0)
    assert pair.changes == changes + 3


def test_the_line_rises_once_for_requests_that_come_together():
    pair = Pair()
    pair.pulse(1, 3, 4, 12)
    assert pair.rises == 1
    assert pair.take() == 0x21
    pair.write(MASTER, EOI)
    assert pair.rises == 2


def test_saved_and_restored_it_goes_on_as_before():
    pair = Pair(icw4=0x11)
    pair.write(MASTER_DATA, 0x40)
    pair.write(ELCR, 0x20)
    pair.pulse(3, 12, 6)
    saved = pair.pic.save()
    again = Pair(ready=False)
    again.pic = Pic(again._rose, again._changed, saved)
    assert again.pic.save() == saved
    assert again.rises == 1
    assert again.take_all(EOI) == pair.take_all(EOI) == [0x2C, 0x23]


# ---------------------------------------------------------------- at random

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 5), st.integers(0, 255)),
        st.tuples(st.just("read"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("pulse"), st.integers(0, 15), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def check(pic: Pic) -> None:
    """What holds whatever a guest has written."""
    for chip in (pic.master, pic.slave):
        assert 0 <= chip.irr <= 0xFF and 0 <= chip.isr <= 0xFF and 0 <= chip.imr <= 0xFF
        assert chip.base % 8 == 0 and 0 <= chip.lowest <= 7
        assert chip.ready or chip.request() < 0
        number = chip.request()
        assert number < 0 or (chip.irr >> number & 1 and not chip.imr >> number & 1)
    assert pic.output == (pic.master.request() >= 0)
    if pic.master.ready and not pic.master.single:
        assert bool(pic.master.irr & 4) == (pic.slave.request() >= 0)


@given(STEPS)
def test_random_accesses(steps):
    """No exception, registers in their bounds, INT as the requests say; a vector is never a surprise."""
    pair = Pair()
    for what, number, value in steps:
        if what == "write":
            pair.write(number, value)
        elif what == "read":
            assert 0 <= pair.read(number) <= 0xFF
        elif what == "pulse":
            pair.pulse(number)
        else:
            chips = (pair.pic.master.base, pair.pic.slave.base)
            vector = pair.take()
            assert vector is None or vector & 0xF8 in chips
        check(pair.pic)
    saved = pair.pic.save()
    other = Pic(lambda: None, lambda: None, saved)
    assert other.save() == saved
    check(other)


class Handlers(RuleBasedStateMachine):
    """A guest that plays by the rules (fully nested, specific ends): each pulse is served once, or merged into one."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.waiting: set[int] = set()
        self.serving: list[int] = []

    @rule(number=st.sampled_from([each for each in range(16) if each != 2]))
    def pulse(self, number: int) -> None:
        self.pair.pulse(number)
        self.waiting.add(number)

    @precondition(lambda self: self.pair.pic.output)
    @rule()
    def take(self) -> None:
        number = self.pair.pic.acknowledge() - 0x20
        assert number in self.waiting
        self.waiting.remove(number)
        self.serving.append(number)

    @precondition(lambda self: self.serving)
    @rule()
    def end(self) -> None:
        number = self.serving.pop()
        if number >= 8:
            self.pair.write(SLAVE, 0x60 | number - 8)
        self.pair.write(MASTER, 0x60 | (2 if number >= 8 else number))

    @invariant()
    def line(self) -> None:
        """The line is high if, and only if, what waits ranks above what is in service."""

        def rank(number: int) -> int:
            return 2 if number >= 8 else number

        busy = min(map(rank, self.serving), default=8)
        assert self.pair.pic.output == any(rank(number) < busy for number in self.waiting)
        check(self.pair.pic)


TestHandlers: Any = Handlers.TestCase
