"""The project's source as data: files, syntax, imports. Nothing of it is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Collection, Hashable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

_Key = TypeVar("_Key", bound=Hashable)


class Import(NamedTuple):
    """One name that a file imports, wherever in the file: in a function and for the type checker, too."""

    line: int
    module: str
    #: "" for ``import module``.
    name: str

    @property
    def full(self) -> str:
        """Return module and name with a dot between them."""
        return f"{self.module}.{self.name}" if self.name else self.module


class Arrow(NamedTuple):
    """A module of the tree imports another one."""

    source: str
    target: str
    #: ``path:line`` of the import.
    place: str


class SourceTree:
    """The Python files below some folders of a root. Paths are relative to it."""

    def __init__(self, root: Path, folders: Collection[str]) -> None:
        self.root = root
        self.files = [
            path.relative_to(root) for folder in sorted(folders) for path in sorted((root / folder).rglob("*.py"))
        ]
        self.modules = {module_name(path): path for path in self.files}

    def text(self, path: Path) -> str:
        """Return what is in a file."""
        return (self.root / path).read_text()

    def syntax(self, path: Path) -> ast.Module:
        """Return the parsed file."""
        return _parsed(self.root / path)

    def imports(self, path: Path) -> Iterator[Import]:
        """Yield every import of a file. Raises AssertionError for a relative one."""
        return iter(_imports(self.root / path))

    def arrows(self) -> Iterator[Arrow]:
        """Yield every import of one module of the tree by another. A name that is a module stands for that module."""
        for module, path in self.modules.items():
            for found in self.imports(path):
                target = found.full if found.full in self.modules else found.module
                if target in self.modules and target != module:
                    yield Arrow(module, target, f"{path}:{found.line}")

    def functions(self, path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Yield name and node of every function and method of a file."""
        for node in ast.walk(self.syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


@cache
def _imports(path: Path) -> tuple[Import, ...]:
    found: list[Import] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            found += [Import(node.lineno, node.module or "", alias.name) for alias in node.names]
    return tuple(found)


def module_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(arrows: Mapping[str, Collection[str]]) -> list[tuple[str, ...]]:
    """Return the groups of nodes from each of which every other one of the group is reached (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return sorted(found)


def differences(found: Mapping[_Key, str], excused: Collection[_Key], which_list: str) -> str:
    """Return "" if exactly the excused ones are found, else what is new, and what needs no excuse any more."""
    new = [f"new: {place}" for key, place in found.items() if key not in excused]
    gone = [f"mended, so take it off {which_list}: {key!r}" for key in excused if key not in found]
    return "\n".join(new + gone)
