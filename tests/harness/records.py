"""Hypothesis strategies from the fields of ipc.schema: any record that its schema allows."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ipc.schema import Bytes, Field, Flag, Int, ListOf, RecordOf, Text


def values_of(field: Field) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a field; its bounds are likelier than what lies between."""
    if isinstance(field, Int):
        return st.sampled_from((field.low, field.high)) | st.integers(field.low, field.high)
    if isinstance(field, Flag):
        return st.booleans()
    if isinstance(field, Text):
        return st.text("ab-é", max_size=field.size)
    if isinstance(field, Bytes):
        return st.binary(max_size=min(field.size, 100))
    if isinstance(field, ListOf):
        items = values_of(field.item)
        return st.lists(items, min_size=field.least, max_size=max(field.least, min(field.size, 4))).map(tuple)
    assert isinstance(field, RecordOf)
    return st.builds(field.record, *[values_of(each) for _, each in field.fields])
