"""Sections: who is saved is restored, who is not known is refused or left out, and bounds hold on both ways."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.schema import Int, RecordOf, Section, pack
from vmm.snapshot import state_file
from vmm.snapshot.section import Saved, collect, parse
from vmm.snapshot.state_file import Frame, MicrovmStateError


class Record(NamedTuple):
    value: int


PART = Section("part", 2, RecordOf(Record, value=Int(9)))
HINT = Section("hint", 1, RecordOf(Record, value=Int(9)), required=False)


@given(st.dictionaries(st.text("0123", max_size=3), st.integers(0, 9), max_size=4))
def test_what_is_collected_is_parsed(values):
    data = collect([Saved(PART, instance, Record(value)) for instance, value in values.items()])
    assert parse(data, [HINT, PART]) == {("part", instance): Record(value) for instance, value in values.items()}


def test_a_unit_is_asked_for_its_state():
    class Unit:
        SECTION = PART
        instance = "x"

        def save(self):
            return Record(7)

    assert parse(collect([Unit()]), [PART]) == {("part", "x"): Record(7)}


def test_a_section_that_is_not_known_is_left_out_if_its_writer_allows_that():
    data = collect([Saved(PART, "", Record(1)), Saved(HINT, "", Record(2))])
    assert parse(data, [PART]) == {("part", ""): Record(1)}
    with pytest.raises(MicrovmStateError, match=r"part .* not known"):
        parse(data, [HINT])


def test_another_version_of_a_section_is_refused():
    data = collect([Saved(PART._replace(version=1), "", Record(1))])
    with pytest.raises(MicrovmStateError, match="has version 1, not 2"):
        parse(data, [PART])


def test_a_value_out_of_bounds_is_neither_written_nor_read():
    with pytest.raises(MicrovmStateError, match=r"part\.value"):
        collect([Saved(PART, "", Record(10))])
    with pytest.raises(MicrovmStateError, match=r"part\.value"):
        parse(state_file.write([Frame("part", "", 2, True, pack((10,)))]), [PART])


@given(st.binary(max_size=100))
def test_arbitrary_content(content):
    """The frame is right, what is in it is not."""
    try:
        records = parse(state_file.write([Frame("part", "", 2, True, content)]), [PART])
    except MicrovmStateError:
        return
    assert records["part", ""] == Record(content[1])
