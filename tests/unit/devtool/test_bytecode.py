"""The byte code that the product runs: without docstrings and annotations, with everything else."""

from __future__ import annotations

import importlib.util
import marshal
from pathlib import Path
from types import CodeType

import pytest

from devtool import bytecode
from devtool.project import PRODUCT, ROOT

SOURCE = '''"""Module."""
from __future__ import annotations
from typing import NamedTuple

top: int = 1
later: int

class Record(NamedTuple):
    """Record."""

    first: int
    second: str = "x"

class Plain:
    """Plain."""

    value: int = 3
    other: str

def documented(a: int, *, b: str = "b") -> str:
    """Documented."""
    inner: str = b
    assert a, "kept"
    return inner

def only_documented():
    """Nothing else."""

async def waiting(x: int) -> int:
    """Waiting."""
    return x
'''


@pytest.fixture
def namespace(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    names: dict[str, object] = {"__name__": "module"}
    exec(bytecode.compiled(path), names)
    return names


def test_docstrings_are_gone(namespace):
    for name in ("Plain", "documented", "only_documented", "waiting"):
        assert namespace[name].__doc__ is None
    assert namespace.get("__doc__") is None


def test_annotations_of_functions_are_gone_and_fields_of_records_stay(namespace):
    assert namespace["documented"].__annotations__ == {}
    assert namespace["Record"]._fields == ("first", "second")
    assert namespace["Record"](1) == (1, "x")


def test_behaviour_stays(namespace):
    assert (namespace["top"], namespace["Plain"].value) == (1, 3)
    assert namespace["documented"](1) == "b"
    assert namespace["only_documented"]() is None
    with pytest.raises(AssertionError, match="kept"):
        namespace["documented"](0)
    assert not hasattr(namespace["Plain"], "other")
    assert "later" not in namespace


def test_line_numbers_stay(namespace):
    assert SOURCE.splitlines()[namespace["documented"].__code__.co_firstlineno - 1].startswith("def documented")


def test_the_product_is_compiled_so():
    for source in (path for package in PRODUCT for path in (ROOT / package).rglob("*.py")):
        content = Path(importlib.util.cache_from_source(str(source))).read_bytes()
        assert _parts(marshal.loads(content[16:])) == _parts(bytecode.compiled(source)), f"{source}: run ./dev setup"


def _parts(code: CodeType) -> list[object]:
    """Return everything but the line tables."""
    inner = [_parts(each) if isinstance(each, CodeType) else each for each in code.co_consts]
    return [code.co_qualname, code.co_code, code.co_names, code.co_varnames, inner]


def test_names_of_hot_functions_are_those_that_they_keep():
    names = bytecode.hot_names(["ipc.descriptors:OwnedDescriptors.take", "no.such.module:f", "ipc.errors:nothing"])
    assert names[0] == "ipc.descriptors"
    assert {"_descriptors", "pop"} <= set(names)
    assert "DescriptorError" not in names  # a global: nobody keeps its name
