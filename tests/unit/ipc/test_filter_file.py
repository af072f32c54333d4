"""Files of custom filters: both layouts that Firecracker has written, and what is none."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipc.errors import FilterFileError
from ipc.filter_file import MAX_FILE_SIZE, MAX_INSTRUCTIONS, decode, encode

PROGRAMS = st.dictionaries(
    st.text(max_size=12), st.integers(0, 300).flatmap(lambda count: st.binary(min_size=8 * count, max_size=8 * count)),
    max_size=6,
)  # fmt: skip


@given(PROGRAMS)
def test_what_is_written_is_read(programs):
    assert decode(encode(programs)) == programs


def test_the_layout_is_that_of_bitcode():
    """By hand, from the crate's rules: lengths first, three to a byte in base 6 and five in base 3."""
    data = {"api": bytes(range(8)), "vcpu": bytes(16), "vmm": b"\xff" * 8}
    expected = b"\x03" + bytes([4, 3 + 4 * 6 + 3 * 36]) + b"apivcpuvmm" + bytes([8, 1 + 2 * 3 + 1 * 9]) + b"\0"
    assert encode(data) == expected + bytes(range(8)) + bytes(16) + b"\xff" * 8


def bincode(programs: dict[str, bytes]) -> bytes:
    parts = [struct.pack("<Q", len(programs))]
    for name, program in programs.items():
        parts += [struct.pack("<Q", len(name.encode())), name.encode(), struct.pack("<Q", len(program) // 8), program]
    return b"".join(parts)


@given(PROGRAMS)
def test_the_layout_of_earlier_versions_is_read(programs):
    assert decode(bincode(programs)) == programs


@pytest.mark.parametrize(
    ("numbers", "packed"),
    [
        ([5], struct.pack("<Q", 5)),
        ([1, 70000], b"\x02" + struct.pack("<2I", 1, 70000)),
        ([1, 2, 300], b"\x04" + struct.pack("<3H", 1, 2, 300)),
        ([7, 8, 7, 7, 7, 7], b"\x05" + struct.pack("<Q", 7) + b"\x0a\x02"),  # bits, above the least of them
    ],
)
def test_packed_integers(numbers, packed):
    """The crate makes integers smaller where it can."""
    content = b"\x01" + b"\x01" + b"x" + bytes([len(numbers)]) + packed
    assert decode(content) == {"x": b"".join([struct.pack("<Q", each) for each in numbers])}


@given(st.binary(max_size=400))
@example(b"")
@example(b"\x01\x01x\xff" + b"\xff" * 8)
@example(b"\xff" + b"\xff" * 8)
def test_garbage_is_refused_or_bounded(data):
    try:
        programs = decode(data)
    except FilterFileError:
        return
    for program in programs.values():
        assert len(program) % 8 == 0 and len(program) <= 8 * MAX_INSTRUCTIONS


@given(PROGRAMS, st.data())
def test_every_cut_and_every_tail_is_refused(programs, data):
    content = encode(programs)
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(FilterFileError):
        decode(content[:cut])
    with pytest.raises(FilterFileError):
        decode(content + b"\0")


def test_bounds():
    with pytest.raises(FilterFileError, match="larger than"):
        decode(bytes(MAX_FILE_SIZE + 1))
    with pytest.raises(FilterFileError, match="larger than"):
        encode({"vmm": bytes(MAX_FILE_SIZE)})
    with pytest.raises(FilterFileError):
        decode(encode({"vmm": bytes(8 * (MAX_INSTRUCTIONS + 1))}))
    with pytest.raises(FilterFileError, match="twice"):
        decode(b"\x02\x01\x01aa\x00\x00")
