"""Fixtures of the ipc tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tests.harness.channels import Place
from tests.harness.memory_fixtures import guest_memory, open_file
from tests.harness.rings import Ring

__all__ = ["guest_memory", "open_file"]


@pytest.fixture
def ring() -> Iterator[Ring]:
    """Return a fresh exit ring."""
    made = Ring()
    yield made
    made.close()


@pytest.fixture
def place() -> Iterator[Place]:
    """Return a private directory for an endpoint."""
    made = Place(tempfile.mkdtemp(prefix="cb-", dir="/tmp"))  # a socket's path has at most 107 bytes
    yield made
    made.close()
