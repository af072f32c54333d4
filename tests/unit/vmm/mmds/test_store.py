"""Content of the metadata service: RFC 7396, limits, paths, the two formats; and GET, PUT, PATCH /mmds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.mmds.store import (
    MAX_DEPTH,
    DataStore,
    MmdsError,
    MmdsLimitError,
    NotFoundError,
    UnsupportedTypeError,
    find,
    merge_patch,
    ordered,
)

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc/~", max_size=2), inner, max_size=3),
    max_leaves=12,
)
#: RFC 7396, appendix A: original, patch, result.
RFC_7396 = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_7396)
def test_merge_patch_as_the_standard_shows_it(target, patch, result):
    before = json.dumps(target)
    assert merge_patch(target, patch) == result
    assert json.dumps(target) == before


@given(VALUES, VALUES)
def test_a_merge_patch_is_idempotent_and_leaves_no_null_of_its_own(target, patch):
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once
    assert merge_patch(None, patch) == merge_patch({}, patch) or not isinstance(patch, dict)


@given(VALUES)
def test_what_is_put_is_found_by_every_path(value):
    store = DataStore(1 << 20)
    store.put(value)

    def walk(item: Any, path: str) -> None:
        assert json.loads(store.get(path, imds=False)) == item
        if not path.endswith("/"):
            assert json.loads(store.get(f"{path}/", imds=False)) == item
        for key, inner in item.items() if isinstance(item, dict) else ():
            if key:
                walk(inner, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
        for index, inner in enumerate(item) if isinstance(item, list) else ():
            walk(inner, f"{path}/{index}")

    walk(value, "")


def test_keys_are_shown_in_order():
    store = DataStore(100)
    store.put({"name": {"b": 1, "a": 2}, "age": "43"})
    store.patch({"b": {"z": 1, "y": 2}})
    assert store.get("", imds=False) == '{"age":"43","b":{"y":2,"z":1},"name":{"a":2,"b":1}}'
    assert store.get("/", imds=True) == "age\nb/\nname/"


@pytest.mark.parametrize(
    "path", ["/x", "/a/b", "/list/2", "/list/-", "/list/01", "/list/x", "x", "/a~1", "/list/999999999999"]
)
def test_paths_that_lead_nowhere(path):
    store = DataStore(100)
    store.put({"a": "text", "list": [1, 2]})
    with pytest.raises(NotFoundError, match=r"^The MMDS resource does not exist\.$"):
        store.get(path, imds=False)


@pytest.mark.parametrize("value", [1, 1.5, True, None, [], ["a"]])
def test_values_without_a_text_form(value):
    store = DataStore(100)
    store.put({"a": value})
    with pytest.raises(UnsupportedTypeError, match=r"^Cannot retrieve value. The value has an unsupported type\.$"):
        store.get("/a", imds=True)


def test_the_limit_counts_bytes_of_compact_json():
    store = DataStore(12)
    store.put({"a": "1234"})
    value: Any
    for value in ({"a": "12345"}, {"a": "123ü"}):
        with pytest.raises(MmdsLimitError, match=r"^The MMDS patch request doesn't fit\.$"):
            store.put(value)
        with pytest.raises(MmdsLimitError):
            store.patch(value)
    assert store.value == {"a": "1234"}
    store.patch({"a": None, "b": "5678"})
    assert store.value == {"b": "5678"}


def test_nesting_is_bounded_also_by_patches():
    def nested(depth: int) -> Any:
        return {"a": nested(depth - 1)} if depth else 1

    store = DataStore(1 << 20)
    store.put(nested(MAX_DEPTH - 1))
    with pytest.raises(MmdsError, match="nested more than 128 levels"):
        store.put(nested(MAX_DEPTH))
    assert store.value == nested(MAX_DEPTH - 1)
    assert find(ordered(nested(3)), "/a/a/a") == 1
