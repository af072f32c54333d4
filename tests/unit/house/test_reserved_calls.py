"""Calls that only some files may make: running the loop from within, the memory fence, opening a file by its name."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

import pytest

from devtool.project import PRODUCT, ROOT
from tests.harness.source_tree import SourceTree, differences
from tests.unit.house import exceptions

#: A handler that runs the loop re-enters it: devices and the execution of exits never do.
RUN_UNTIL = {"base/event_manager.py", "vmm/session.py", "vmm/operations/", "vmm/cells/"}
NEVER_RUN_UNTIL = {"vmm/cells/exits.py"}
#: Orders of memory between processes are proved in one place each.
FENCE = {"ipc/shared_memory.py", "ipc/exit_ring.py", "virtio/queue.py", "virtio/driver.py"}
#: Walls: after its seal a cell opens what a client names, a kernel, a drive's file, and nothing else.
OPEN = {
    "vmm/files.py", "vmm/config/", "vmm/boot/", "virtio/block/backing_file.py",
    "base/boot_id.py",  # of the launcher and of programs of the host, which know no other ground
    "ipc/drills/",  # tries what a cell must not be able to do
}  # fmt: skip
#: The launcher and the programs of the host open by nature.
NOT_IN_A_CELL = {"jailer", "cellblock"}


def users(tree: SourceTree, name: str) -> dict[str, str]:
    """Return path → place, of every file that names a function (or attribute) ``name``."""
    found: dict[str, str] = {}
    for path in tree.files:
        for node in ast.walk(tree.syntax(path)):
            named = (isinstance(node, ast.Attribute) and node.attr == name) or (
                isinstance(node, ast.Name | ast.alias) and name in (getattr(node, "id", ""), getattr(node, "name", ""))
            )
            if named or (isinstance(node, ast.FunctionDef) and node.name == name):
                found.setdefault(str(path), f"{path}:{getattr(node, 'lineno', 0)}: names {name}")
    return found


def openers(tree: SourceTree) -> dict[str, str]:
    """Return path → place, of every file that opens by name: ``os.open``, ``io.open``, ``open``."""
    found: dict[str, str] = {}
    for path in tree.files:
        for node in ast.walk(tree.syntax(path)):
            of_module = (
                isinstance(node, ast.Attribute)
                and node.attr in ("open", "open_code", "fdopen")
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "posix", "io", "_io")
            )
            if of_module or (isinstance(node, ast.Name) and node.id == "open"):
                found.setdefault(str(path), f"{path}:{getattr(node, 'lineno', 0)}: opens by name")
    return found


def outside(found: dict[str, str], allowed: Collection[str], never: Collection[str] = ()) -> dict[str, str]:
    """Return those of ``found`` that are not allowed; ``folder/`` stands for what is in it."""
    return {
        path: place
        for path, place in found.items()
        if path in never or not any(path == entry or (entry[-1] == "/" and path.startswith(entry)) for entry in allowed)
    }


def test_the_loop_is_run_from_within_only_where_it_may_be():
    found = outside(users(SourceTree(ROOT, PRODUCT), "run_until"), RUN_UNTIL, NEVER_RUN_UNTIL)
    assert not (wrong := differences(found, exceptions.RUN_UNTIL, "exceptions.RUN_UNTIL")), wrong


def test_the_fence_is_used_only_where_memory_orders_are_proved():
    for name in ("fence", "fence_lock"):
        found = outside(users(SourceTree(ROOT, PRODUCT), name), FENCE)
        assert not found, found


def test_cells_open_by_name_only_where_they_may():
    found = outside(openers(SourceTree(ROOT, set(PRODUCT) - NOT_IN_A_CELL)), OPEN)
    assert not (wrong := differences(found, exceptions.OPEN, "exceptions.OPEN")), wrong


@pytest.mark.parametrize(
    "text", ["events.run_until(done, 1)", "wait = events.run_until", "from p import run_until", "run_until()"]
)
def test_a_call_is_found(tmp_path, text):
    (tmp_path / "p/room").mkdir(parents=True)
    for path in ("p/may.py", "p/may_not.py", "p/room/may.py", "p/room/never.py"):
        (tmp_path / path).write_text(text)
    (tmp_path / "p/other.py").write_text("'run_until'  # run_until\nrun()")
    found = users(SourceTree(tmp_path, ["p"]), "run_until")
    assert set(outside(found, {"p/may.py", "p/room/"}, {"p/room/never.py"})) == {"p/may_not.py", "p/room/never.py"}


@pytest.mark.parametrize("text", ["os.open(path, 0)", "open(path)", "with open(path) as f: pass", "f = os.open"])
def test_an_open_is_found(tmp_path, text):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.py").write_text(text)
    (tmp_path / "p/y.py").write_text("opened.open(1)\nos.close(1)\n_open(1)")
    assert list(openers(SourceTree(tmp_path, ["p"]))) == [str(Path("p/x.py"))]
