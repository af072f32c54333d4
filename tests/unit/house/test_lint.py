"""The linters are tests."""

from __future__ import annotations

import subprocess

import pytest

from devtool.cli import lint_commands
from devtool.project import ROOT


@pytest.mark.parametrize("command", lint_commands(), ids=["ruff", "mypy"])
def test_linter_is_content(command):
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
