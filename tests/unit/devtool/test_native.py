"""Building the extension: again when something has changed, and never in the way of a set-up."""

from __future__ import annotations

import os

import pytest

from base import native_loops
from devtool import native


@pytest.fixture
def target(monkeypatch, tmp_path):
    path = tmp_path / "native" / "_loops.so"
    monkeypatch.setattr(native_loops, "PATH", str(path))
    return path


def test_it_is_built_once(target):
    native.build()
    first = target.stat().st_ctime_ns
    native.build()
    assert target.stat().st_ctime_ns == first
    assert sorted(os.listdir(target.parent)) == ["_loops.so", "_loops.stamp"]
    target.with_suffix(".stamp").write_text("another source")
    native.build()
    assert target.stat().st_ctime_ns != first


def test_without_a_compiler_there_is_none(target, monkeypatch, capfd):
    native.build()
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.build()
    assert not target.exists()
    assert "no C compiler" in capfd.readouterr().err


def test_a_source_that_does_not_compile_is_no_end_of_the_set_up(target, monkeypatch, tmp_path, capfd):
    (tmp_path / "wrong.c").write_text("int x = ;")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "wrong.c")
    native.build()
    assert not os.listdir(target.parent)
    assert "does not compile" in capfd.readouterr().err


def test_it_stays_small():
    assert len(native.SOURCE.read_text().splitlines()) < 300
