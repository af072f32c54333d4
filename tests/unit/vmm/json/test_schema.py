"""Typed decoding: serde's words for bodies that are JSON but not the body that was asked for."""

from __future__ import annotations

import pytest

from vmm.json.decoder import JsonError
from vmm.json.schema import (
    ANYTHING,
    BOOLEAN,
    PATH,
    STRING,
    U8,
    U64,
    USIZE,
    Converted,
    Field,
    List,
    Object,
    Option,
    Variant,
    decode,
    one_of,
)


def _record(*values):
    return values


INNER = Object("Inner", _record, Field("size", U64), Field("note", Option(STRING)), ignore_unknown=True)
OUTER = Object(
    "Outer",
    _record,
    Field("count", U8),
    Field("memory", USIZE),
    Field("flag", BOOLEAN, False),
    Field("kind", Option(Variant("One", "Two", "Three"))),
    Field("path", Option(PATH)),
    Field("inner", Option(INNER)),
    Field("level", Option(Converted({"on": 1}.get, "Invalid level"))),
)

UNKNOWN_FOO = "unknown field `foo`, expected one of `count`, `memory`, `flag`, `kind`, `path`, `inner`, `level`"
REFUSED = [
    # Missing: at the end of the object.
    (b'{"memory": 128}', "missing field `count` at line 1 column 15"),
    (b'{"count": 2}', "missing field `memory` at line 1 column 12"),
    (b'{"count": 2}   ', "missing field `memory` at line 1 column 12"),
    (b'{\n  "count": 2\n}', "missing field `memory` at line 3 column 1"),
    (b"{}", "missing field `count` at line 1 column 2"),
    # Unknown and duplicate: after the key and what white space follows it.
    (b'{"foo": 1}', UNKNOWN_FOO + " at line 1 column 6"),
    (b'{"count": 1, "foo"  : 1}', UNKNOWN_FOO + " at line 1 column 20"),
    (b'{"count": 1, "count": 2}', "duplicate field `count` at line 1 column 20"),
    # Types and values: after the value, or before it where it is no scalar.
    (b'{"count": "-2"}', 'invalid type: string "-2", expected u8 at line 1 column 14'),
    (b'{"count": "a\\"b"}', 'invalid type: string "a\\"b", expected u8 at line 1 column 16'),
    (b'{"count": 256}', "invalid value: integer `256`, expected u8 at line 1 column 13"),
    (b'{"count": -1}', "invalid value: integer `-1`, expected u8 at line 1 column 12"),
    (b'{"count": 1.5}', "invalid type: floating point `1.5`, expected u8 at line 1 column 13"),
    (b'{"count": 1e2}', "invalid type: floating point `100.0`, expected u8 at line 1 column 13"),
    (b'{"count": -0}', "invalid type: floating point `-0.0`, expected u8 at line 1 column 12"),
    (b'{"count": null}', "invalid type: null, expected u8 at line 1 column 14"),
    (b'{"count": true}', "invalid type: boolean `true`, expected u8 at line 1 column 14"),
    (b'{"count": [1]}', "invalid type: sequence, expected u8 at line 1 column 10"),
    (b'{"count": {}}', "invalid type: map, expected u8 at line 1 column 10"),
    (b'{"count": x}', "expected value at line 1 column 11"),
    (b'{"count": ', "EOF while parsing a value at line 1 column 10"),
    (
        b'{"count": 1, "memory": 18446744073709551616}',
        "invalid type: floating point `1.8446744073709552e+19`, expected usize at line 1 column 43",
    ),
    (b'{"flag": "random_string"}', 'invalid type: string "random_string", expected a boolean at line 1 column 24'),
    (b'{"flag": null}', "invalid type: null, expected a boolean at line 1 column 13"),
    (b'{"flag": 0}', "invalid type: integer `0`, expected a boolean at line 1 column 10"),
    (b'{"kind": "Four"}', "unknown variant `Four`, expected one of `One`, `Two`, `Three` at line 1 column 15"),
    (b'{"kind": 4}', "expected value at line 1 column 10"),
    (b'{"kind": [', "expected value at line 1 column 10"),
    (b'{"path": 4}', "invalid type: integer `4`, expected path string at line 1 column 10"),
    (b'{"path": nul}', "expected ident at line 1 column 13"),
    (b'{"inner": 5}', "invalid type: integer `5`, expected struct Inner at line 1 column 11"),
    (b'{"inner": {"note": null}}', "missing field `size` at line 1 column 24"),
    (b'{"inner": {"size": "x"}}', 'invalid type: string "x", expected u64 at line 1 column 22'),
    (b'{"level": "off"}', "Invalid level at line 1 column 16"),
    (b'{"level": "off" , "count": 1}', "Invalid level at line 1 column 16"),
    # Not an object at all.
    (b'"text"', 'invalid type: string "text", expected struct Outer at line 1 column 6'),
    (b"1", "invalid type: integer `1`, expected struct Outer at line 1 column 1"),
    (b'{"count": 1, "memory": 2} x', "trailing characters at line 1 column 27"),
    (b'{"count": 1, "memory": 2', "EOF while parsing an object at line 1 column 24"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_refused_body_has_serdes_words_and_position(text, message):
    with pytest.raises(JsonError) as error:
        decode(OUTER, text)
    assert str(error.value) == message


def test_accepted_body():
    text = b"""{"memory": 18446744073709551615, "count": 255, "flag": true, "kind": {"Two": null},
        "path": "/a", "inner": {"size": 1, "anything": [{"else": 1}], "note": "n"}, "level": "on"}"""
    assert decode(OUTER, text) == (255, (1 << 64) - 1, True, "Two", "/a", (1, "n"), 1)


def test_absent_and_null_fields_have_their_defaults():
    assert decode(OUTER, b'{"count": 0, "memory": 0, "kind": null, "path": null}') == (
        0, 0, False, None, None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"One": 1}', "invalid type: integer `1`, expected unit at line 1 column 9"),
        (b'{"Four": null}', "unknown variant `Four`, expected `One` or `Two` at line 1 column 7"),
        (b'{"One": null', "EOF while parsing an object at line 1 column 12"),
        (b'{"One": null, "Two": null}', "expected value at line 1 column 12"),
    ],
)
def test_variant_as_object(text, message):
    with pytest.raises(JsonError) as error:
        decode(Variant("One", "Two"), text)
    assert str(error.value) == message


def test_lists():
    assert decode(List(U8), b"[1, 2]") == [1, 2]
    assert decode(List(ANYTHING), b"[]") == []
    with pytest.raises(JsonError, match="invalid type: null, expected a sequence at line 1 column 4"):
        decode(List(U8), b"null")
    with pytest.raises(JsonError, match="missing field `size` at line 1 column 3"):
        decode(List(INNER), b"[{}]")


#: A structure of serde's, which is also read from a list of its values.
ONE = Object("One", _record, Field("amount_mib", U64))
BUCKET = Object("Inner", _record, Field("size", U64), Field("burst", Option(U64)), Field("refill_time", U64))
STRUCTURE = Object(
    "Outer",
    _record,
    Field("vcpu_count", U8),
    Field("mem", U64),
    Field("smt", BOOLEAN, False),
    Field("name", Option(STRING)),
    Field("ours", Option(STRING), extension=True),
    Field("opt", Option(U8), None),
    Field("inner", Option(BUCKET)),
    Field("list", List(ONE), []),
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'[1, 2, true, "x", 5, null]', (1, 2, True, "x", None, 5, None, [])),
        (b"[1,2,true,null,5,[1,null,3]]", (1, 2, True, None, None, 5, (1, None, 3), [])),
        (
            b'[1,2,true,null,5,{"size":1,"refill_time":3},[[1],[2],{"amount_mib":3}]]',
            (1, 2, True, None, None, 5, (1, None, 3), [(1,), (2,), (3,)]),
        ),
        (b'{"vcpu_count":1,"mem":2,"ours":"y","inner":[1,2,3]}', (1, 2, False, None, "y", None, (1, 2, 3), [])),
    ],
)
def test_a_list_stands_for_an_object(text, value):
    assert decode(STRUCTURE, text) == value


@pytest.mark.parametrize(
    ("type_", "text", "message"),
    [
        # What serde_json 1.0.154 says of the same structures.
        (ONE, b"[]", "invalid length 0, expected struct One with 1 element at line 1 column 2"),
        (ONE, b"[5,]", "trailing comma at line 1 column 4"),
        (ONE, b"[5,6]", "trailing characters at line 1 column 4"),
        (ONE, b"[5 6]", "trailing characters at line 1 column 4"),
        (ONE, b"[5 ", "EOF while parsing a list at line 1 column 3"),
        (ONE, b"[", "EOF while parsing a list at line 1 column 1"),
        (STRUCTURE, b"[]", "invalid length 0, expected struct Outer with 7 elements at line 1 column 2"),
        (STRUCTURE, b"[1,2]", "invalid length 3, expected struct Outer with 7 elements at line 1 column 5"),
        (STRUCTURE, b'[1,2,true,"x",5]', "invalid length 5, expected struct Outer with 7 elements at line 1 column 16"),
        (STRUCTURE, b"[1,2,null]", "invalid type: null, expected a boolean at line 1 column 9"),
        (STRUCTURE, b"[300]", "invalid value: integer `300`, expected u8 at line 1 column 4"),
        (
            STRUCTURE,
            b"[1,2,true,null,5,[1]]",
            "invalid length 1, expected struct Inner with 3 elements at line 1 column 20",
        ),
        (
            STRUCTURE,
            b"[1,2,true,null,5,[1,null\n]\n,]",
            "invalid length 2, expected struct Inner with 3 elements at line 2 column 1",
        ),
        (
            STRUCTURE,
            b'{"vcpu_count":1,"mem":2,"inner":[1] , "x":1}',
            "invalid length 1, expected struct Inner with 3 elements at line 1 column 35",
        ),
        (STRUCTURE, b'{"vcpu_count":1,"mem":2,"inner":[1', "EOF while parsing a list at line 1 column 34"),
        (STRUCTURE, b"[1,2,true,null,5,[1,2,3],[[1],[2]],9]", "trailing characters at line 1 column 36"),
        (STRUCTURE, b"[1,2,true,null,5,[1,2,3],[[1],[2]],]", "trailing comma at line 1 column 36"),
    ],
)
def test_lists_that_stand_for_no_object(type_, text, message):
    with pytest.raises(JsonError) as error:
        decode(type_, text)
    assert str(error.value) == message


def test_an_error_outside_any_object_has_a_place_too():
    with pytest.raises(JsonError, match="Invalid level at line 1 column 3"):
        decode(Converted({"on": 1}.get, "Invalid level"), b'"x"')


def test_one_of():
    assert one_of((), "fields") == "there are no fields"
    assert one_of(("a",), "fields") == "expected `a`"
    assert one_of(("a", "b"), "fields") == "expected `a` or `b`"
    assert one_of(("a", "b", "c"), "fields") == "expected one of `a`, `b`, `c`"
