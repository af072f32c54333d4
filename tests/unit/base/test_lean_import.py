"""Compiled modules without their packages, and the packages afterwards."""

from __future__ import annotations

import subprocess

import pytest

from devtool.project import PYTHON, ROOT

CORES = {
    "zstandard.backend_c": "zstandard.ZstdDecompressor is core.ZstdDecompressor",
    "lz4.block._block": "__import__('lz4.block').block.decompress is core.decompress",
}


@pytest.mark.parametrize("name", CORES)
def test_the_package_stays_out_and_can_be_imported_later(name):
    top = name.partition(".")[0]
    code = f"""
import sys
from base.lean_import import import_core
core = import_core({name!r})
assert {top!r} not in sys.modules and core is sys.modules[{name!r}]
import {top}
assert {CORES[name]}
assert sys.modules[{name!r}] is core
"""
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.module", "zstandard.no_such_core"])
def test_what_is_not_there_is_an_import_error_and_leaves_nothing(name):
    code = f"""
import sys
from base.lean_import import import_core
before = set(sys.modules)
try:
    import_core({name!r})
except ImportError:
    assert set(sys.modules) == before, set(sys.modules) - before
else:
    raise AssertionError("imported")
"""
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, timeout=60)
