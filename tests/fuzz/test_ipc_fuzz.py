"""Frames from a peer that wants to break us: MessageError, nothing else, within bounds of time and memory."""

from __future__ import annotations

import subprocess

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devtool.project import PYTHON, ROOT
from ipc.errors import MessageError
from ipc.schema import MAX_FRAME_SIZE, U64, decode
from tests.fuzz.ipc_fuzz import SCHEMAS, check


@pytest.mark.soak("fuzz", "ipc")
def test_hostile_frames_under_limits(scale, seed, tmp_path):
    count = scale(1_200, 200_000)
    path = tmp_path / "frame"
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.fuzz.ipc_fuzz", str(count), str(seed), str(path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    frame = path.read_bytes() if path.exists() else b""
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nexit {done.returncode}; frame: {frame[:500].hex()}"
    accepted = int(done.stdout.split(" frames, ")[1].split()[0])
    assert accepted > count // 100, "hardly any mutation is legal: the records are not reached"


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), U64),
        st.floats(),
        st.text(max_size=8),
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.integers(0, 3), inner, max_size=2)),
    max_leaves=25,
)


@pytest.mark.soak("fuzz", "ipc")
def test_any_bytes(scale):
    @settings(max_examples=scale(150, 20_000))
    @given(st.binary(max_size=400))
    def any_bytes(frame) -> None:
        check(frame, ())

    any_bytes()


@pytest.mark.soak("fuzz", "ipc")
def test_any_values_in_an_envelope(scale):
    @settings(max_examples=scale(150, 20_000))
    @given(st.integers(0, 22), plain, st.lists(plain, max_size=12))
    def any_values(kind, sequence, values) -> None:
        for parts in ([1, 7, sequence, 0, 0, kind, values], [1, 7, 1, 0, 0, kind, values], values):
            check(msgpack.packb(parts), ())

    any_values()


PITFALLS = {
    "array32 of 4 G values": b"\xdd" + b"\xff" * 4,
    "array as long as the frame": b"\xdd" + (MAX_FRAME_SIZE - 5).to_bytes(4, "big") + b"\xc0" * (MAX_FRAME_SIZE - 5),
    "1,000 long arrays in each other": (b"\xdd\x00\x03\xff\x00" * 1000).ljust(MAX_FRAME_SIZE, b"\x90"),
    "an array of empty arrays": b"\xdd\x00\x03\xff\xf0" + b"\x90" * 0x3FFF0,
    "nesting beyond the parser's stack": b"\x91" * 100_000 + b"\xc0",
    "nesting up to the parser's stack": b"\x91" * 1023 + b"\xc0",
    "str32 of 4 GiB": b"\xdb" + b"\xff" * 4,
    "bin32 of 4 GiB": b"\xc6" + b"\xff" * 4,
    "map32 of 4 G pairs": b"\xdf" + b"\xff" * 4,
    "map of a pair": b"\x81\x01\x01",
    "empty map": b"\x80",
    "map with an unhashable key": b"\x81\x91\x01\x01",
    "map with equal keys": b"\x82\x01\x01\x01\x02",
    "ext8 without content": b"\xc7\x00\x05",
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "timestamp without content": b"\xc7\x00\xff",
    "timestamp with too many nanoseconds": b"\xd7\xff" + b"\xff" * 8,
    "ext32 of 4 GiB": b"\xc9" + b"\xff" * 4 + b"\x01",
    "not UTF-8": b"\xa2\xc0\xaf",
    "a surrogate": b"\xa3\xed\xa0\x80",
    "trailing bytes": b"\xc0\xc0",
    "nothing": b"",
    "a reserved byte": b"\xc1",
    "NaN": b"\xcb\x7f\xf8" + bytes(6),
    "more than a frame": b"\x90" * (MAX_FRAME_SIZE + 1),
}


@pytest.mark.parametrize("name", PITFALLS)
def test_known_pitfalls(name):
    bad = PITFALLS[name]
    for schema in SCHEMAS:
        for frame in (bad, b"\x97\x01\x07\x01\x00\x00\x02" + bad, b"\x97" + bad * 7, b"\x97" + bad + bytes(6)):
            with pytest.raises(MessageError):
                decode(schema, frame)
