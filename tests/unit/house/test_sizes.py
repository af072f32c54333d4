"""No file above 500 lines, and no function above 60."""

from __future__ import annotations

import ast
from collections.abc import Collection

from devtool.project import CHECKED, ROOT
from tests.harness.source_tree import SourceTree, differences
from tests.unit.house import exceptions

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
#: Guests and helpers of the tests that are not written in Python.
OTHER_LANGUAGES = (".c", ".go", ".h", ".inc", ".mjs", ".S", ".sh")
#: Tables of data: one row, one fact. Their length is the number of facts.
TABLES = {"tests/api_table.py"}


def long_files(tree: SourceTree, tables: Collection[str]) -> dict[str, str]:
    """Return path → what is wrong, of every file of code that is too long."""
    found: dict[str, str] = {}
    folders = {path.parts[0] for path in tree.files}
    others = [path for folder in folders for path in (tree.root / folder).rglob("*") if path.suffix in OTHER_LANGUAGES]
    for path in [*tree.files, *(path.relative_to(tree.root) for path in others)]:
        lines = len(tree.text(path).splitlines())
        if lines > MAX_FILE_LINES and str(path) not in tables:
            found[str(path)] = f"{path}: {lines} lines"
    return found


def long_functions(tree: SourceTree) -> dict[str, str]:
    """Return path:name → what is wrong, of every function that is too long. Decorators are not part of a function."""
    found: dict[str, str] = {}
    for path in tree.files:
        for name, node in tree.functions(path):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found[f"{path}:{name}"] = f"{path}:{node.lineno}: {name} has {lines} lines"
    return found


def test_no_file_is_too_long():
    found = long_files(SourceTree(ROOT, CHECKED), TABLES)
    assert not (wrong := differences(found, exceptions.LONG_FILES, "exceptions.LONG_FILES")), wrong


def test_no_function_is_too_long():
    found = long_functions(SourceTree(ROOT, CHECKED))
    assert not (wrong := differences(found, exceptions.LONG_FUNCTIONS, "exceptions.LONG_FUNCTIONS")), wrong


def test_tables_are_data():
    """What is called a table has constants and no code to speak of."""
    for name in TABLES:
        body = ast.parse((ROOT / name).read_text()).body
        lines = {type(node): 0 for node in body}
        for node in body:
            assert node.end_lineno is not None
            lines[type(node)] += node.end_lineno - node.lineno + 1
        data = lines.get(ast.Assign, 0) + lines.get(ast.AnnAssign, 0)
        assert data > 0.7 * sum(lines.values()), name


def test_what_is_too_long_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    table = "@mark(\n" + "    1,\n" * 100 + ")\n"
    body = "    pass\n" * (MAX_FUNCTION_LINES - 1)
    (tmp_path / "p/functions.py").write_text(
        f"{table}def fits():\n{body}\n\ndef long():\n{body}    pass\n\n\nclass C:\n    async def late(self):\n"
        + "        pass\n" * MAX_FUNCTION_LINES
    )
    (tmp_path / "p/fits.py").write_text("1\n" * MAX_FILE_LINES)
    for name in ("long.py", "table.py", "guest.S"):
        (tmp_path / "p" / name).write_text("1\n" * (MAX_FILE_LINES + 1))
    tree = SourceTree(tmp_path, ["p"])
    assert set(long_files(tree, {"p/table.py"})) == {"p/long.py", "p/guest.S"}
    assert set(long_functions(tree)) == {"p/functions.py:long", "p/functions.py:late"}
