"""The JSON reader: what it takes, and the words and positions of what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.api_fuzz import AboutAsLarge, whole_number
from vmm.json.decoder import RECURSION_LIMIT, JsonError, decode
from vmm.json.text import debug_string, float_text, json_text

# Texts and positions as serde_json 1.0 reports them.
REFUSED = [
    (b"", "EOF while parsing a value at line 1 column 0"),
    (b"  ", "EOF while parsing a value at line 1 column 2"),
    (b"\n", "EOF while parsing a value at line 2 column 0"),
    (b"invalid", "expected value at line 1 column 1"),
    (b"nul", "EOF while parsing a value at line 1 column 3"),
    (b"nulk", "expected ident at line 1 column 4"),
    (b"tRue", "expected ident at line 1 column 2"),
    (b"falsy", "expected ident at line 1 column 5"),
    (b"{", "EOF while parsing an object at line 1 column 1"),
    (b'{"a"', "EOF while parsing an object at line 1 column 4"),
    (b'{"a":', "EOF while parsing a value at line 1 column 5"),
    (b'{"a" 1}', "expected `:` at line 1 column 6"),
    (b'{"a":1', "EOF while parsing an object at line 1 column 6"),
    (b'{"a":1 "b":2}', "expected `,` or `}` at line 1 column 8"),
    (b'{"a":1,}', "trailing comma at line 1 column 8"),
    (b'{"a":1,', "EOF while parsing a value at line 1 column 7"),
    (b"{1:2}", "key must be a string at line 1 column 2"),
    (b'{"a":1}}', "trailing characters at line 1 column 8"),
    (b"[", "EOF while parsing a list at line 1 column 1"),
    (b"[1", "EOF while parsing a list at line 1 column 2"),
    (b"[1 2]", "expected `,` or `]` at line 1 column 4"),
    (b"[1,]", "trailing comma at line 1 column 4"),
    (b"[1,", "EOF while parsing a value at line 1 column 3"),
    (b"1 2", "trailing characters at line 1 column 3"),
    (b"{\n\n  }\n x", "trailing characters at line 4 column 2"),
    (b'"abc', "EOF while parsing a string at line 1 column 4"),
    (b'"a\nb"', "control character (\\u0000-\\u001F) found while parsing a string at line 2 column 0"),
    (b'"a\tb"', "control character (\\u0000-\\u001F) found while parsing a string at line 1 column 3"),
    (b'"\\x"', "invalid escape at line 1 column 3"),
    (b'"\\', "EOF while parsing a string at line 1 column 2"),
    (b'"\\u12', "EOF while parsing a string at line 1 column 5"),
    (b'"\\u12g4"', "invalid escape at line 1 column 7"),
    (b'"\\uDC00"', "lone leading surrogate in hex escape at line 1 column 7"),
    (b'"\\uD801"', "unexpected end of hex escape at line 1 column 8"),
    (b'"\\uD801\\n"', "unexpected end of hex escape at line 1 column 9"),
    (b'"\\uD801\\u0041"', "lone leading surrogate in hex escape at line 1 column 13"),
    (b'"\xff"', "invalid unicode code point at line 1 column 3"),
    (b"-", "EOF while parsing a value at line 1 column 1"),
    (b"-a", "invalid number at line 1 column 2"),
    (b"01", "invalid number at line 1 column 2"),
    (b"1.", "EOF while parsing a value at line 1 column 2"),
    (b"1.x", "invalid number at line 1 column 3"),
    (b"1e", "EOF while parsing a value at line 1 column 2"),
    (b"1e+", "EOF while parsing a value at line 1 column 3"),
    (b"1ex", "invalid number at line 1 column 3"),
    (b"1e400", "number out of range at line 1 column 5"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_refused_text_has_serdes_words_and_position(text, message):
    with pytest.raises(JsonError) as error:
        decode(text)
    assert str(error.value) == message
    assert error.value.code == "vmm.json"


def test_nesting_is_bounded():
    deepest = RECURSION_LIMIT - 1
    assert decode(b"[" * deepest + b"]" * deepest)
    with pytest.raises(JsonError, match="recursion limit exceeded at line 1 column 128"):
        decode(b"[" * RECURSION_LIMIT)
    with pytest.raises(JsonError, match="recursion limit exceeded"):
        decode(b'{"a":' * 100_000)


def test_numbers_keep_the_kind_that_serde_gives_them():
    assert decode(b"18446744073709551615") == (1 << 64) - 1
    assert isinstance(decode(b"18446744073709551616"), float)
    assert decode(b"-9223372036854775808") == -(1 << 63)
    assert isinstance(decode(b"-9223372036854775809"), float)
    minus_zero = decode(b"-0")
    assert isinstance(minus_zero, float)
    assert math.copysign(1, minus_zero) == -1
    assert decode(b"1e2") == 100.0
    assert isinstance(decode(b"9" * 300), float)
    with pytest.raises(JsonError, match="number out of range"):
        decode(b"9" * 50_000)


def test_escapes():
    assert decode(rb'"\"\\\/\b\f\n\r\t\u0041\u00e9\ud83d\ude00"') == '"\\/\b\f\n\r\tAé😀'
    assert decode(b'"\\u0000"') == "\0"
    assert decode('"grüß 😀"'.encode()) == "grüß 😀"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.booleans(), st.sampled_from([None, 1]))
def test_what_the_standard_library_writes_is_read(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    assert decode(data) == json.loads(text, parse_float=AboutAsLarge)


@given(json_values)
def test_what_we_write_is_read_by_the_standard_library(value):
    assert json.loads(json_text(value)) == value


@given(st.binary(max_size=64) | st.text(alphabet='{}[]":,0123456789.eE+-truefalsn \\u\n', max_size=64).map(str.encode))
def test_any_bytes_are_read_or_refused_as_the_standard_library_does(data):
    try:
        expected = json.loads(
            data.decode(), parse_constant=_no_constant, parse_int=whole_number, parse_float=AboutAsLarge
        )
    except (ValueError, RecursionError):
        expected = _REFUSED
    error = None
    value = None
    try:
        value = decode(data)
    except JsonError as raised:
        error = raised
    if error is None:
        assert value == expected
        return
    lines = data.split(b"\n")
    assert 1 <= error.line <= len(lines)
    assert 0 <= error.column <= len(lines[error.line - 1]) + 1
    # Stricter than the standard library: no lone surrogates, no numbers beyond f64.
    assert expected is _REFUSED or b"\\u" in data or "out of range" in error.reason


_REFUSED = object()


def _no_constant(name: str) -> None:
    raise ValueError(name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        (3.0, "3.0"),
        (-0.0, "-0.0"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (18446744073709551616.0, "1.8446744073709552e+19"),
        (1.25e-5, "0.0000125"),
        (-1e-5, "-0.00001"),
        (1e-6, "1e-6"),
        (1e300, "1e+300"),
    ],
)
def test_floating_point_text(value, text):
    assert float_text(value) == text
    assert float(text) == value


def test_debug_string_stays_on_one_line():
    assert debug_string("plain") == '"plain"'
    assert debug_string('a"b\\c\nd\x1b\0é') == '"a\\"b\\\\c\\nd\\u{1b}\\0é"'


def test_json_text_is_compact_and_keeps_order():
    assert json_text({"b": [1, None, True], "a": 'x"\n\x01ü'}) == '{"b":[1,null,true],"a":"x\\"\\n\\u0001ü"}'
