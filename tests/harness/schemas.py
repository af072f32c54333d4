"""Values for messages, built from the schema's own bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from ipc.schema import Bytes, Field, Flag, Int, ListOf, Maybe, RecordOf, Schema, Text

#: Longest text, byte string and list that hypothesis draws; the bounds themselves are tested one by one.
_DRAWN_LENGTH = 40
_DRAWN_ITEMS = 3


def values_of(field: Field) -> st.SearchStrategy[Any]:
    """Return a strategy for legal values of a field, as a sender has them."""
    if isinstance(field, Int):
        return st.one_of(st.integers(field.low, field.high), st.sampled_from([field.low, field.high]))
    if isinstance(field, Flag):
        return st.booleans()
    if isinstance(field, Text):
        return st.text(st.characters(codec="utf-8"), max_size=min(field.size, _DRAWN_LENGTH))
    if isinstance(field, Bytes):
        return st.binary(max_size=min(field.size, _DRAWN_LENGTH))
    if isinstance(field, ListOf):
        return st.lists(values_of(field.item), max_size=min(field.size, _DRAWN_ITEMS)).map(tuple)
    if isinstance(field, Maybe):
        return st.none() | values_of(field.field)
    assert isinstance(field, RecordOf), f"no strategy for {type(field).__name__}"
    return st.tuples(*(values_of(part) for _, part in field.fields)).map(field.record._make)


def records_of(schema: Schema) -> dict[type[Any], RecordOf]:
    """Return the messages of a schema with their fields."""
    return {field.record: field for field in schema._by_kind.values()}


def messages_of(schema: Schema) -> st.SearchStrategy[Any]:
    """Return a strategy for the messages of a channel."""
    return st.one_of([values_of(field) for field in records_of(schema).values()])


def largest(field: Field) -> Any:
    """Return the value of a field that takes most room in a frame."""
    if isinstance(field, Int):
        return field.high
    if isinstance(field, Flag):
        return True
    if isinstance(field, Text):
        return "\U0001f9f1" * field.size
    if isinstance(field, Bytes):
        return bytes(field.size)
    if isinstance(field, ListOf):
        return (largest(field.item),) * field.size
    if isinstance(field, Maybe):
        return largest(field.field)
    assert isinstance(field, RecordOf)
    return field.record._make(largest(part) for _, part in field.fields)


def smallest(field: Field) -> Any:
    """Return the shortest legal value of a field."""
    if isinstance(field, Int):
        return field.low
    if isinstance(field, Flag):
        return False
    if isinstance(field, Text):
        return ""
    if isinstance(field, Bytes):
        return b""
    if isinstance(field, ListOf):
        return ()
    if isinstance(field, Maybe):
        return None
    assert isinstance(field, RecordOf)
    return field.record._make(smallest(part) for _, part in field.fields)


_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    float("nan"),
    "",
    "1",
    b"",
    b"1",
    [],
    [0],
    [[]],
    1 << 63,
    "\ud800",
    {},
    1 << 64,
)


def wrong_values(field: Field) -> Iterator[Any]:
    """Return illegal values of a field: other types, and what lies just outside its bounds."""
    for odd in _ODD:
        if not _legal(field, odd):
            yield odd
    if isinstance(field, Int):
        yield from (field.low - 1, field.high + 1, float(field.low), str(field.low))
    elif isinstance(field, Text):
        yield from ("x" * (field.size + 1), b"x")
    elif isinstance(field, Bytes):
        yield from (bytes(field.size + 1), "x")
    elif isinstance(field, ListOf):
        yield [plain(largest(field.item))] * (field.size + 1)
        yield "x" * field.size
        for wrong in wrong_values(field.item):
            yield [wrong]
    elif isinstance(field, Maybe):
        yield from (wrong for wrong in wrong_values(field.field) if wrong is not None)
    elif isinstance(field, RecordOf):
        good = plain(smallest(field))
        yield [*good, 0]
        if good:
            yield good[:-1]
        for index, (_, part) in enumerate(field.fields):
            for wrong in wrong_values(part):
                yield [*good[:index], wrong, *good[index + 1 :]]


def plain(value: Any) -> Any:
    """Return a value as it looks after it came from the wire: tuples are lists."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _legal(field: Field, value: Any) -> bool:
    """Judge the few values of ``_ODD`` by their type and the field's bounds, independently of ``check``."""
    if isinstance(field, Int):
        return type(value) is int and field.low <= value <= field.high
    if isinstance(field, Flag):
        return type(value) is bool
    if isinstance(field, Text):
        return type(value) is str and value != "\ud800"
    if isinstance(field, Bytes):
        return type(value) is bytes
    if isinstance(field, ListOf):
        return type(value) is list and all(_legal(field.item, item) for item in value)
    if isinstance(field, Maybe):
        return value is None or _legal(field.field, value)
    assert isinstance(field, RecordOf)
    return type(value) is list and len(value) == len(field.fields) and not value
