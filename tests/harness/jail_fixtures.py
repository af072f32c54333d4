"""The directory for jails, of the tests that make some; they need root."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def base() -> Iterator[Path]:
    """Return a --chroot-base-dir of this test alone that others can pass through.

    Its name is short (socket paths have 107 characters), and may be part of an id: see tests.harness.jail.id_of.
    """
    directory = Path("/tmp") / f"jail-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o755)
    jails = directory / "base"
    jails.mkdir(mode=0o755)
    yield jails
    shutil.rmtree(directory, ignore_errors=True)
