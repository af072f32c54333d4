"""The frames of a saved state: exact round trip, bounds, and nothing but their own error for anything else."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.schema import MAX_FRAME_SIZE
from vmm.snapshot import state_file
from vmm.snapshot.state_file import MAX_INSTANCE, MAX_NAME, Frame, MicrovmStateError, read, write

NAMES = st.text("abc-", min_size=1, max_size=MAX_NAME)
FRAMES = st.lists(
    st.builds(
        Frame, NAMES, st.text("01", max_size=MAX_INSTANCE), st.integers(1, 65535), st.booleans(), st.binary(max_size=60)
    ),
    max_size=5,
    unique_by=lambda frame: frame[:2],
)


def test_the_layout_is_pinned():
    """docs/formats/microvm-state.md; a change here is a new version."""
    head = bytes.fromhex("02 01 0300 01000000 03000000")
    rest = b"ab7xyz"
    checksum = zlib.crc32(head + bytes(4) + rest).to_bytes(4, "little")
    written = write([Frame("ab", "7", 3, True, b"xyz")])
    assert written == b"CBSTATE\n" + bytes.fromhex("04000000 01000000") + head + checksum + rest


@given(FRAMES)
def test_round_trip(frames):
    assert read(write(frames)) == frames


@given(FRAMES, st.data())
def test_no_damage_goes_unseen(frames, data):
    """Whatever is cut off, added or changed is refused: the checksum covers every byte of a section."""
    whole = bytearray(write(frames))
    kind = data.draw(st.sampled_from(["cut", "add", "change"]))
    if kind == "cut":
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    elif kind == "add":
        whole += data.draw(st.binary(min_size=1, max_size=40))
    else:
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MicrovmStateError):
        read(bytes(whole))


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data):
    with pytest.raises(MicrovmStateError):
        read(data)


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=200))
def test_arbitrary_bytes_behind_a_good_header(count, data):
    """What a header promises is not reserved, and not believed."""
    try:
        assert read(state_file._FILE_HEADER.pack(state_file.MAGIC, state_file.VERSION, count) + data) == []
    except MicrovmStateError:
        pass


@pytest.mark.parametrize(
    "frame",
    [
        Frame("", "", 1, True, b""),
        Frame("a" * (MAX_NAME + 1), "", 1, True, b""),
        Frame("a", "1" * (MAX_INSTANCE + 1), 1, True, b""),
        Frame("a", "", 0, True, b""),
        Frame("a", "", 65536, True, b""),
        Frame("a", "", 1, True, bytes(MAX_FRAME_SIZE + 1)),
        Frame("\xe9", "", 1, True, b""),
    ],
)
def test_what_is_out_of_bounds_is_not_written(frame):
    with pytest.raises(MicrovmStateError):
        write([frame])


def test_a_section_comes_once_and_there_are_not_too_many(monkeypatch):
    frame = Frame("a", "1", 1, True, b"")
    with pytest.raises(MicrovmStateError, match="twice"):
        write([frame, frame._replace(content=b"x")])
    one = write([frame])
    head, section = one[:16], one[16:]
    twice = head[:12] + (2).to_bytes(4, "little") + section + section
    with pytest.raises(MicrovmStateError, match="twice"):
        read(twice)
    monkeypatch.setattr(state_file, "MAX_SECTIONS", 1)
    assert read(one) == [frame]
    with pytest.raises(MicrovmStateError, match="more than 1"):
        write([frame, frame._replace(instance="2")])
    with pytest.raises(MicrovmStateError, match="more than 1"):
        read(twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b"X"), "no state of a microVM"),
        ((8, b"\x02"), "of version 2, not 4"),
        ((16 + 4, b"\x03"), "flags that do not exist"),
    ],
)
def test_other_files_and_versions_are_named(change, message):
    position, new = change
    whole = bytearray(write([Frame("a", "", 1, True, b"")]))
    whole[position : position + len(new)] = new
    with pytest.raises(MicrovmStateError, match=message):
        read(bytes(whole))
