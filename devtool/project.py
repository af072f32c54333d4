"""Where things are: the checkout, its virtual environment, the cache outside the tree."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LAUNCHERS = VENV / "bin"
#: Exit status of ./dev lab when the emulated machine failed, not the command that ran in it.
LAB_FAILED_STATUS = 125
#: Packages that make up the product, in import order.
PRODUCT = ("base", "ipc", "virtio", "vmm", "vcpu_worker", "device_cell", "jailer", "cellblock")
#: Everything that is linted and type-checked.
CHECKED = (*PRODUCT, "lab", "devtool", "bench", "tests")


class DevError(Exception):
    """A step of the developer tool failed. The text says what happened and what to do."""


def cache_directory() -> Path:
    """Return the folder for downloaded and built images (made if missing), outside the tree."""
    home = os.environ.get("CELLBLOCK_CACHE")
    directory = Path(home) if home else Path.home() / ".cache" / "cellblock"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def existing(names: tuple[str, ...]) -> list[str]:
    """Return those folders of the checkout that exist and hold Python files."""
    return [name for name in names if any((ROOT / name).rglob("*.py"))]


def say(text: str) -> None:
    """Print one line about what the tool does, to stderr so that stdout stays a command's own."""
    print(f"dev: {text}", file=sys.stderr, flush=True)
