"""Fixtures of the jail tests: they need root, and a directory for jails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def base() -> Iterator[Path]:
    """Return a --chroot-base-dir with a short name (socket paths have 107 characters) that others can pass through."""
    directory = Path(tempfile.mkdtemp(prefix="jail-", dir="/tmp"))
    directory.chmod(0o755)
    jails = directory / "base"
    jails.mkdir(mode=0o755)
    yield jails
    shutil.rmtree(directory, ignore_errors=True)
