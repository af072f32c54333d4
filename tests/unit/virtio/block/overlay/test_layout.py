"""What an overlay file says is checked before it is used: nothing but OverlayError comes out, whatever it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio.block.overlay import layout
from virtio.block.overlay.layout import (
    ATOMIC,
    HEADER_AREA,
    MAX_CLUSTERS,
    MAX_SIZE,
    PHASE_CLEAR,
    PHASE_NONE,
    SAMPLES,
    BaseIdentity,
    Geometry,
    State,
    check_geometry,
    pack_header,
    pack_session,
    pack_state,
    parse_header,
    parse_session,
    parse_states,
    sample_offsets,
    state_slot,
)
from virtio.errors import OverlayError

ID = bytes(range(16))
BASE = BaseIdentity(1 << 20, 5, tuple(range(SAMPLES)))
SIZES = st.integers(1, 1 << 25).map(lambda sectors: sectors << 9)
GEOMETRIES = st.builds(Geometry, st.integers(12, 21), SIZES, st.binary(min_size=16, max_size=16))


@given(GEOMETRIES)
def test_a_header_says_what_was_written(geometry):
    assert parse_header(pack_header(geometry)) == geometry


@given(GEOMETRIES)
def test_the_parts_of_a_file_do_not_overlap(geometry):
    step = 1 << geometry.cluster_bits
    assert 8 * geometry.map_size >= geometry.clusters
    assert geometry.durable_offset == HEADER_AREA
    assert geometry.durable_offset + geometry.map_size == geometry.volatile_offset
    assert geometry.volatile_offset + geometry.map_size <= geometry.data_offset
    assert geometry.data_offset % step == 0
    assert geometry.clusters * step >= geometry.size > (geometry.clusters - 1) * step
    assert geometry.file_size == geometry.data_offset + geometry.clusters * step


@given(st.binary(max_size=600))
def test_any_bytes_are_a_header_or_an_error(data):
    for sector in (data, layout.MAGIC + data, layout.MAGIC + b"\1\0\0\0" + data):
        try:
            parse_header(sector)
        except OverlayError:
            continue
        raise AssertionError("a header that nobody has written")


@given(GEOMETRIES, st.integers(0, 43), st.integers(1, 255))
def test_a_header_of_which_a_byte_has_changed_is_refused(geometry, at, change):
    sector = bytearray(pack_header(geometry))
    sector[at] ^= change
    with pytest.raises(OverlayError):
        parse_header(bytes(sector))


@given(st.integers(0, 1 << 32), st.integers(0, (1 << 64) - 1))
def test_a_sealed_header_is_bounded_as_well(cluster_bits, size):
    sector = layout._sealed(layout._HEADER.pack(layout.MAGIC, 1, cluster_bits & 0xFFFF_FFFF, size, ID))
    try:
        geometry = parse_header(sector)
    except OverlayError:
        return
    assert geometry.clusters <= MAX_CLUSTERS
    assert geometry.file_size < 1 << 63


@pytest.mark.parametrize(
    ("bits", "size", "text"),
    [
        (11, 512, "2^12 to 2^21"),
        (22, 512, "2^12 to 2^21"),
        (16, 0, "whole sectors"),
        (16, 513, "whole sectors"),
        (21, MAX_SIZE + 512, "whole sectors"),
        (12, (MAX_CLUSTERS << 12) + 512, "take larger ones"),
    ],
)
def test_what_no_drive_can_be(bits, size, text):
    with pytest.raises(OverlayError, match=text.replace("^", r"\^")):
        check_geometry(bits, size)


def test_other_versions_are_told():
    with pytest.raises(OverlayError, match="version 7; this program knows version 1"):
        parse_header(layout._sealed(layout._HEADER.pack(layout.MAGIC, 7, 16, 512, ID)))


def area(*sectors: bytes) -> bytes:
    """Return a header area with these states."""
    found = bytearray(HEADER_AREA)
    for offset, sector in zip(layout.STATE_OFFSETS, sectors, strict=False):
        found[offset : offset + ATOMIC] = sector.ljust(ATOMIC, b"\0")
    return bytes(found)


def test_the_later_state_counts_and_the_earlier_one_when_it_is_cut_short():
    earlier, later = State(4, PHASE_NONE, BASE), State(5, PHASE_CLEAR, BASE._replace(size=512))
    assert state_slot(4) != state_slot(5)
    both = area(pack_state(earlier), pack_state(later))
    assert parse_states(both) == later
    for length in range(0, 200, 7):
        assert parse_states(area(pack_state(earlier), pack_state(later)[:length])) == earlier
    with pytest.raises(OverlayError, match="both of its states"):
        parse_states(area(b"", pack_state(earlier)))  # where it does not belong


@given(st.binary(min_size=ATOMIC, max_size=ATOMIC), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_any_bytes_are_a_state_or_an_error(data, generation, phase):
    sealed = layout._sealed(layout._STATE.pack(generation, phase, 0, 1 << 50, 0) + layout._SAMPLES.pack(*BASE.samples))
    for sector in (data, sealed):
        with pytest.raises(OverlayError):
            parse_states(area(sector, sector))


@given(st.binary(max_size=ATOMIC))
def test_a_session_is_told_only_if_it_is_whole(data):
    assert parse_session(pack_session(ID)) == ID
    assert parse_session(data) == b""
    assert parse_session(data.ljust(ATOMIC, b"\0")) == b""


@given(st.integers(0, 1 << 50))
def test_samples_lie_in_the_base(size):
    offsets = sample_offsets(size)
    assert len(offsets) == SAMPLES
    assert all(offset < max(size, 1) and offset % layout.SAMPLE_SIZE == 0 for offset in offsets)
    if size:
        assert max(offsets) + layout.SAMPLE_SIZE >= size
