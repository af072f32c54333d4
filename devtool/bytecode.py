"""The product's byte code, compiled ahead of time and without what only readers of the source need.

A cell's memory holds every docstring and every annotation of a function that was imported, between objects that the
cells write to. They are left out here, as are the columns of line tables; assertions and line numbers stay. Run by
``./dev setup`` as a program, under ``-X no_debug_ranges``. An edited file is compiled by the interpreter as usual,
until the next setup.
"""

from __future__ import annotations

import ast
import dis
import importlib._bootstrap_external as import_system
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType

from devtool.project import PRODUCT, ROOT, existing
from jailer import pack

STAMP = ROOT / "build" / "bytecode.json"
HOT_FUNCTIONS = ROOT / "jailer" / "hot" / "functions.txt"
HOT_NAMES = ROOT / "jailer" / "hot" / "build" / "names.txt"
#: Before the code in a cached file: magic number, flags, time and size of the source (PEP 552).
_CACHE_HEADER_SIZE = 16
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)


class _Stripper(ast.NodeTransformer):
    """Removes docstrings, and annotations that make no fields of a record."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([ast.Pass(lineno=node.body[0].lineno, col_offset=0)] if node.body else [])
        if isinstance(node, _FUNCTIONS):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.ClassDef) and not any("NamedTuple" in ast.dump(base) for base in node.bases):
            node.body = [_plain(each) for each in node.body]
        if isinstance(node, (ast.Module, *_FUNCTIONS)):
            node.body = [_plain(each) for each in node.body]
        return node


def _plain(statement: ast.stmt) -> ast.stmt:
    """Return an annotated assignment without its annotation."""
    if not isinstance(statement, ast.AnnAssign):
        return statement
    if statement.value is None:
        return ast.copy_location(ast.Pass(), statement)
    return ast.copy_location(ast.Assign([statement.target], statement.value), statement)


def compiled(path: Path) -> CodeType:
    """Compile a source file without docstrings and annotations."""
    tree = ast.parse(path.read_bytes(), str(path))
    _Stripper().visit(tree)
    return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True, optimize=0)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


def _identity(source: Path, target: Path) -> list[int]:
    status = source.stat()
    return [status.st_mtime_ns, status.st_size, target.stat().st_mtime_ns if target.exists() else 0]


def compile_product() -> None:
    """Compile what changed since the last time, or was compiled by the interpreter since."""
    try:
        known: dict[str, list[int]] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        known = {}
    current = {}
    for source in (path for package in existing(PRODUCT) for path in sorted((ROOT / package).rglob("*.py"))):
        target = Path(importlib.util.cache_from_source(str(source)))
        name = str(source)
        if known.get(name) != _identity(source, target):
            status = source.stat()
            make_file = import_system._code_to_timestamp_pyc  # type: ignore[attr-defined]
            try:
                _write(target, make_file(compiled(source), int(status.st_mtime), status.st_size))
            except SyntaxError:
                continue  # whoever imports it will say so
        current[name] = _identity(source, target)
    if current != known or not Path(pack.PATH).is_file():
        write_pack([Path(name) for name in current])
        _write(STAMP, json.dumps(current).encode())


def write_pack(sources: Sequence[Path]) -> None:
    """Write the cached byte code of these sources into one file (jailer.pack)."""
    index: pack.Index = {}
    codes: list[bytes] = []
    offset = 0
    for source in sources:
        code = Path(importlib.util.cache_from_source(str(source))).read_bytes()[_CACHE_HEADER_SIZE:]
        status = source.stat()
        package = source.name == "__init__.py"
        parts = source.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if package else parts)
        index[name] = (str(source), package, status.st_mtime_ns, status.st_size, offset, len(code))
        codes.append(code)
        offset += len(code)
    _write(Path(pack.PATH), pack.join(index, b"".join(codes)))


# ---------------------------------------------------------------- names


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


#: Instructions that make the interpreter keep, for a while, a reference to the name: in an instance's dictionary, or in
#: the cache of what types have.
_KEEPING = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"}


def names_of(code: CodeType) -> Iterator[str]:
    """Yield the names whose reference counts change when ``code`` runs."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _KEEPING:
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner.co_name
            yield inner.co_qualname
            yield from names_of(inner)


def hot_names(functions: Sequence[str]) -> list[str]:
    """Return the names that the listed functions (``module:qualified name``) use, in order; unknown ones use none."""
    modules: dict[str, dict[str, CodeType]] = {}
    found: dict[str, None] = {}
    for function in functions:
        module, _, qualname = function.partition(":")
        if module not in modules:
            path = ROOT / f"{module.replace('.', '/')}.py"
            modules[module] = {each.co_qualname: each for each in _nested(compiled(path))} if path.is_file() else {}
        code = modules[module].get(qualname)
        if code is not None:
            found.update(dict.fromkeys((module, *names_of(code))))
    return list(found)


def write_hot_names() -> None:
    """Write the names that the cells' hot functions use, for jailer.hot."""
    functions = HOT_FUNCTIONS.read_text().splitlines()
    content = "\n".join(hot_names(functions)).encode()
    if not HOT_NAMES.is_file() or HOT_NAMES.read_bytes() != content:
        _write(HOT_NAMES, content)


def main() -> int:
    """Compile; exit status 0."""
    compile_product()
    if HOT_FUNCTIONS.is_file():
        try:
            write_hot_names()
        except SyntaxError:
            pass  # as above
    return 0


if __name__ == "__main__":
    sys.exit(main())
