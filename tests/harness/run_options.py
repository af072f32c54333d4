"""What this run of the tests was asked for (place, soak, seed), and the types of what conftest.py offers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from tests.harness.leftovers import Leftovers

_Count = TypeVar("_Count")

IN_LAB = os.environ.get("CELLBLOCK_LAB") == "1"
#: Name of the soak that runs now ("all" for every one), or "".
SOAK = os.environ.get("CELLBLOCK_SOAK", "")
SEED = int(os.environ.get("CELLBLOCK_SEED", "1"))


class Scale(Protocol):
    """Chooses between a test's reduced and full count."""

    def __call__(self, reduced: _Count, full: _Count) -> _Count: ...


class NoLeftovers(Protocol):
    """Makes a block that fails if it leaves something behind."""

    def __call__(self, *directories: Path | str, names: tuple[str, ...] = ()) -> AbstractContextManager[Leftovers]: ...
