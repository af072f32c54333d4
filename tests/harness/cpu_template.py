"""`cellblock cpu-template`, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from devtool.project import LAUNCHERS

#: The names that the program has; the first one is that of today.
NAMES = ("cellblock cpu-template", "cpu-template", "cpu-template-helper")


def run(*arguments: object, program: str = NAMES[0], status: int = 0) -> str:
    """Run the program under one of its names; return what it prints, errors included."""
    name, *words = program.split()
    command = [str(LAUNCHERS / name), *words, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def read(path: Path) -> Any:
    return json.loads(path.read_text())
