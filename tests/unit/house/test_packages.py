"""Which package may know which: one top-level package per kind of process, and the grounds that they share."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from devtool.project import PRODUCT, ROOT
from tests.harness.source_tree import SourceTree, differences
from tests.unit.house import exceptions

#: Where a cell's process begins. The jailer has these in its template, and forks cells into them.
ENTRY_POINTS = {"vmm.main", "vmm.cli", "vcpu_worker.main", "device_cell.main", "pager.main"}
#: package → what it may import of other packages of ours; a name stands for all that is below it.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "ipc": {"base"},
    "virtio": {"base", "ipc"},
    "vmm": {"base", "ipc", "virtio"},
    "vcpu_worker": {"base", "ipc"},
    "device_cell": {"base", "ipc", "virtio"},
    "pager": {"base", "ipc"},
    "jailer": {"base", "ipc", *ENTRY_POINTS},
    # The last two: docs/adr/host-tools-use-the-products-code.md.
    "cellblock": {
        "base",
        "ipc",
        "vmm.cpu_config",
        "vmm.snapshot",
        "vmm.json",
        "vmm.config.file",
        "jailer.host_check",
        "virtio.block.overlay",
        "virtio.errors",
    },
}
#: What is in the repository beside the product. No package of the product may import it.
BESIDE = ("bench", "devtool", "lab", "tests")


def strangers(
    tree: SourceTree, may_import: Mapping[str, Collection[str]], beside: Collection[str]
) -> dict[tuple[str, str], str]:
    """Return (package, module that it may not import) → where it does."""
    ours = {*may_import, *beside}
    found: dict[tuple[str, str], str] = {}
    for path in tree.files:
        package = path.parts[0]
        for name in tree.imports(path):
            top = name.module.partition(".")[0]
            if top not in ours or top == package:
                continue
            allowed = may_import[package]
            if not any(name.full == target or name.full.startswith(f"{target}.") for target in allowed):
                found.setdefault((package, name.module), f"{path}:{name.line}: {package} imports {name.full}")
    return found


def test_the_table_has_every_package():
    assert set(PRODUCT) <= set(MAY_IMPORT)
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= {*PRODUCT, *BESIDE}


def test_packages_know_only_what_they_may():
    found = strangers(SourceTree(ROOT, PRODUCT), MAY_IMPORT, BESIDE)
    assert not (wrong := differences(found, exceptions.PACKAGES, "exceptions.PACKAGES")), wrong


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("import b.part", "b.part"),
        ("from b import other", "b"),
        ("from b.other import name", "b.other"),
        ("def f():\n    from b import other", "b"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b.other import name", "b.other"),
        ("import tests.harness", "tests.harness"),
    ],
)
def test_a_stranger_is_found(tmp_path, text, module):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text(f"import os\nimport a.y\nfrom b.entry import run\nfrom b import entry\n{text}\n")
    found = strangers(SourceTree(tmp_path, ["a"]), {"a": {"b.entry"}, "b": set()}, ["tests"])
    assert list(found) == [("a", module)]
