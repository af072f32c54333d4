"""Numbers that are no whole numbers of 64 bits: what is stored of them and how it is written, as by serde_json."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.json.decoder import JsonError, decode
from vmm.json.number import scaled, significand
from vmm.json.schema import BOOLEAN, U64
from vmm.json.schema import decode as decode_as
from vmm.json.text import float_text, json_text

#: What `serde_json::from_str::<Value>` and `to_string` make of a text (version 1.0.154).
WRITTEN = {
    "1e30": "1e+30",
    "123456789012345678901234567890": "1.2345678901234568e+29",
    "1e15": "1000000000000000.0",
    "1e16": "1e+16",
    "1E5": "100000.0",
    "1.5e-5": "0.000015",
    "1e-6": "1e-6",
    "1e-7": "1e-7",
    "-1.5e+21": "-1.5e+21",
    "-0": "-0.0",
    "0e0": "0.0",
    "1e-400": "0.0",
    "0e99999999999999999999": "0.0",
    "123e-2147483649": "0.0",
    "5e-324": "5e-324",
    "1.7976931348623157e308": "1.7976931348623157e+308",
    "18446744073709551616": "1.8446744073709552e+19",
    "-9223372036854775808": "-9223372036854775808",
    "-9223372036854775809": "-9.223372036854776e+18",
    "12345678901234567e3": "1.2345678901234567e+19",
    "1" + "0" * 400 + "e-400": "1.0",
    # Not the nearest number.
    "3.9166573353688696e-29": "3.91665733536887e-29",
    "515433566402.510589": "515433566402.5106",
    "61686933e-34": "6.168693300000001e-27",
    "8866084121379e181": "8.866084121378999e+193",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_of_what_was_read(text):
    assert json_text(decode(text.encode())) == WRITTEN[text]


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("1e400", 5),
        ("-1e999", 6),
        ("1" + "0" * 309, 310),
        ("1e2147483648", 12),
        ("1e99999999999999", 12),  # noticed at the digit that is one too many
    ],
)
def test_out_of_range(text, column):
    with pytest.raises(JsonError) as error:
        decode(text.encode())
    assert str(error.value) == f"number out of range at line 1 column {column}"


@pytest.mark.parametrize("type_", [U64, BOOLEAN], ids=["u64", "bool"])
@pytest.mark.parametrize(
    ("text", "found"),
    [("1e3", "1000.0"), ("1e30", "1e+30"), ("-0", "-0.0"), ("18446744073709551616", "1.8446744073709552e+19")],
)
def test_no_floating_point_number_is_a_whole_one(type_, text, found):
    expected = "u64" if type_ is U64 else "a boolean"
    with pytest.raises(JsonError) as error:
        decode_as(type_, text.encode())
    message = f"invalid type: floating point `{found}`, expected {expected} at line 1 column {len(text)}"
    assert str(error.value) == message


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_written_is_about_what_was_read(value):
    text = float_text(value)
    assert float(text) == value
    read = decode(text.encode())
    assert isinstance(read, float)
    assert math.isclose(read, value, rel_tol=1e-15, abs_tol=5e-324)
    assert math.copysign(1, read) == math.copysign(1, value)


@given(st.from_regex(rb"[0-9]{1,40}", fullmatch=True), st.from_regex(rb"[0-9]{0,40}", fullmatch=True))
def test_the_significand_fits_into_64_bits(whole, fraction):
    number, power = significand(whole, fraction)
    assert 0 <= number < 1 << 64
    exact = int(whole + fraction)
    stored = number * 10 ** (power + len(fraction))
    assert abs(stored - exact) <= 10**-18 * exact * 20
    assert math.isclose(scaled(number, power), float(b"%s.%s" % (whole, fraction or b"0")), rel_tol=1e-15)
