"""The optional extension: loaded where it was built, and else not missed."""

from __future__ import annotations

import subprocess

import pytest

from base import native_loops
from devtool.project import PYTHON, ROOT


def test_it_is_loaded_once_and_only_when_asked_for():
    code = (
        "from base import native_loops\n"
        "assert native_loops.loops() is None\n"
        "made = native_loops.load()\n"
        "assert made is native_loops.load() is native_loops.loops()\n"
        "print(made.BlockLoop.__name__)"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "BlockLoop\n", done.stderr


def test_a_template_loads_it():
    """A cell in its jail could not."""
    code = (
        "from jailer.template import load_roles\nfrom base import native_loops\nload_roles()\n"
        "print(native_loops.loops() is not None)"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_where_there_is_none_nothing_happens(monkeypatch, tmp_path, content):
    monkeypatch.setattr(native_loops, "_loaded", None)
    path = tmp_path / "_loops.so"
    if content is not None:
        path.write_bytes(content)
    assert native_loops.load(str(path)) is None
    assert native_loops.loops() is None
