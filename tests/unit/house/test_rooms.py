"""The rooms of the controller stand in one order, and each imports only what stands before it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from devtool.project import ROOT
from tests.harness.source_tree import SourceTree, differences
from tests.unit.house import exceptions

ORDER = (
    "errors", "files", "file_limit", "stall_watch", "layout", "placement", "cli",
    "json",
    "observe",
    "boot", "cpu_config", "mmds", "devices",
    "config",
    "cells",
    "operations",
    "snapshot",
    "machine",
    "session",
    "api",
    "main",
)  # fmt: skip


def backward(tree: SourceTree, package: str, order: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return (room, room that it imports though it does not stand before it) → where it does."""
    rank = {room: place for place, room in enumerate(order)}
    found: dict[tuple[str, str], str] = {}
    for source, target, place in tree.arrows():
        if not source.startswith(f"{package}.") or not target.startswith(f"{package}."):
            continue
        room, other = source.split(".")[1], target.split(".")[1]
        if room != other and not (room in rank and other in rank and rank[other] < rank[room]):
            found.setdefault((room, other), f"{place}: {room} imports {target}")
    return found


def test_rooms_of_the_controller_import_only_what_stands_before_them():
    found = backward(SourceTree(ROOT, ["vmm"]), "vmm", ORDER)
    assert not (wrong := differences(found, exceptions.ROOMS, "exceptions.ROOMS")), wrong


def test_every_room_has_a_place():
    rooms = {path.parts[1].removesuffix(".py") for path in SourceTree(ROOT, ["vmm"]).files} - {"__init__"}
    named = {room for arrow in exceptions.ROOMS for room in arrow}
    assert rooms <= {*ORDER, *named}, "vmm/ has a room that the order does not have"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize(
    ("path", "text", "arrows"),
    [
        ("late.py", "from vmm.early.part import name", []),
        ("early/part.py", "from vmm.early import other", []),
        ("early/part.py", "from vmm import late", [("early", "late")]),
        ("early/part.py", "import vmm.late", [("early", "late")]),
        ("early/part.py", "def f():\n    from vmm.late import name", [("early", "late")]),
        ("early/part.py", "if TYPE_CHECKING:\n    from vmm.late import name", [("early", "late")]),
        ("unknown.py", "import vmm.late", [("unknown", "late")]),
        ("late.py", "import vmm.unknown", [("late", "unknown")]),
    ],
)
def test_an_arrow_that_runs_back_is_found(tmp_path, path, text, arrows):
    (tmp_path / "vmm/early").mkdir(parents=True)
    for name in ("early/part.py", "early/other.py", "late.py", "unknown.py"):
        (tmp_path / "vmm" / name).write_text("")
    (tmp_path / "vmm" / path).write_text(text)
    assert list(backward(SourceTree(tmp_path, ["vmm"]), "vmm", ("early", "late"))) == arrows
