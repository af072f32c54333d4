"""The supervisor's own JSON, next to the json package."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from jailer.log import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(VALUES)
def test_it_is_what_the_json_package_writes(value):
    assert json_text(value) == json.dumps(value, separators=(",", ":"))
