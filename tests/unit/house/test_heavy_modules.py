"""Heavy modules of the standard library are kept out of the product, wherever in a file they would be imported."""

from __future__ import annotations

from collections.abc import Collection

from devtool.project import PRODUCT, ROOT
from tests.harness.source_tree import SourceTree

#: They cost more at a cold start, or bring more code into a cell, than they are worth there.
KEPT_OUT = {
    "aiohttp", "argparse", "asyncio", "concurrent", "dataclasses", "inspect", "logging", "multiprocessing", "numpy",
    "pathlib", "pydantic", "pyroute2", "requests", "shutil", "subprocess", "tempfile", "unittest",
}  # fmt: skip
#: Programs that run on the host, never in a cell or on the way to one.
HOST_SIDE_PACKAGES = {"cellblock"}
HOST_SIDE = {"jailer/seccomp/compile.py"}


def heavy(tree: SourceTree, modules: Collection[str], host_side: Collection[str]) -> list[str]:
    """Return where one of the modules is imported, but for the files of the host's side."""
    return [
        f"{path}:{found.line}: imports {found.module}"
        for path in tree.files
        if str(path) not in host_side
        for found in tree.imports(path)
        if found.module.partition(".")[0] in modules
    ]


def test_the_product_keeps_heavy_modules_out():
    wrong = heavy(SourceTree(ROOT, set(PRODUCT) - HOST_SIDE_PACKAGES), KEPT_OUT, HOST_SIDE)
    assert not wrong, "\n".join(wrong)


def test_a_heavy_module_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.py").write_text("import os\n\n\ndef f():\n    from pathlib import Path\n")
    (tmp_path / "p/host.py").write_text("import subprocess\n")
    assert heavy(SourceTree(tmp_path, ["p"]), {"pathlib", "subprocess"}, {"p/host.py"}) == ["p/x.py:5: imports pathlib"]
