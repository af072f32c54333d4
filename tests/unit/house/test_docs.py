"""What documentation names exists: files, modules and what is in them, pages and their headings.

Read are the pages, and docstrings and comments of the code. A name is looked up in the source; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from devtool.project import ROOT

PACKAGES = (
    "base", "ipc", "virtio", "vmm", "vcpu_worker", "device_cell", "jailer", "cellblock",
    "lab", "devtool", "bench", "tests",
)  # fmt: skip
_ANY_PACKAGE = "|".join(PACKAGES)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

#: A path of the tree, or a pattern of paths.
_PATH = re.compile(rf"(?<![\w/.~$}}-])(?:{_ANY_PACKAGE}|docs)/(?:[\w./-]*[\w/])?(?:\*[\w.]*)?")
#: A module, or a name in one.
_DOTTED = re.compile(rf"(?<![\w/.<-])(?:{_ANY_PACKAGE})(?:\.[a-zA-Z_]\w*)+(?![\w/(]*[/@])")
#: A page named from another one, without a link.
_BARE_PAGE = re.compile(r"(?<![\w/.(-])(?:formats|adr)/[\w-]+\.md")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|\s)#.*$")
#: A word in capitals stands for something of the reader's.
_PLACEHOLDER = re.compile(r"[A-Z]{3,}")
#: What looks like a name of ours and is one of something else.
OTHERS = {
    "cellblock.run", "cellblock.script", "cellblock.modules", "cellblock.end",  # parameters of a guest's kernel
    "cellblock/script",  # a file in a guest's archive
    "vmm.panic_count",  # a metric
}  # fmt: skip
_CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------- names in the source


@cache
def _module(name: str) -> Path | None:
    """Return the source of a module, or the folder of a package without one."""
    path = ROOT.joinpath(*name.split("."))
    return next((each for each in (path.with_suffix(".py"), path) if each.exists()), None)


@cache
def _names(path: Path) -> dict[str, set[str]]:
    """Return what a module defines: name → what is in it, if it is a class."""
    found: dict[str, set[str]] = {}
    for node in _flat(ast.parse(path.read_bytes()).body):
        if isinstance(node, ast.ClassDef):
            found[node.name] = set(_members(node))
        else:
            found.update({name: set() for name in _bound(node)})
    return found


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(node, part, []))
        yield node


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))


def _members(node: ast.ClassDef) -> Iterator[str]:
    for part in node.body:
        yield from _bound(part)
        for inner in ast.walk(part):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                yield inner.attr


def is_there(dotted: str) -> bool:
    """Tell whether a module exists, with the name in it, with the member in that."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = _module(".".join(parts[:length]))
        if path is None:
            continue
        rest = parts[length:]
        if not rest:
            return True
        source = path if path.is_file() else path / "__init__.py"
        names = _names(source) if source.is_file() else {}
        if rest[0] not in names:
            return False
        return len(rest) == 1 or not names[rest[0]] or rest[1] in names[rest[0]]
    return False


# ---------------------------------------------------------------- texts


def said(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of what a page, or a module's docstrings and comments, say."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for number, line in enumerate(text.splitlines(), 1):
        comment = _COMMENT.search(line)
        if comment:
            yield number, comment[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            yield from enumerate((ast.get_docstring(node, clean=False) or "").splitlines(), first.lineno)


def missing(text: str) -> Iterator[str]:
    """Yield what a text names and is not there."""
    for path in _PATH.findall(text):
        placeholder = _PLACEHOLDER.search(path)
        known = path[: placeholder.start()].rpartition("/")[0] if placeholder else path
        if path not in OTHERS and not any(ROOT.glob(known)):
            yield path
    for dotted in _DOTTED.findall(_PATH.sub(" ", text)):
        if dotted not in OTHERS and not dotted.endswith(".md") and not is_there(dotted):
            yield dotted
    yield from (f"docs/{page}" for page in _BARE_PAGE.findall(text) if not (ROOT / "docs" / page).is_file())


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the usual renderers make them."""
    headings = _HEADING.findall(_CODE_BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead nowhere in this tree."""
    for target in _LINK.findall(_CODE_BLOCK.sub("", page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            yield target


# ---------------------------------------------------------------- tests


def test_what_is_named_exists():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in (*PAGES, *SOURCES)
        for line, text in said(path)
        for name in missing(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    wrong = [f"{page.relative_to(ROOT)}: {target}" for page in PAGES for target in broken_links(page)]
    assert not wrong, "\n".join(wrong)


def test_every_page_is_linked():
    """A page that no other page leads to is not found by anybody."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in _LINK.findall(page.read_text())
    }
    named = {ROOT / "docs" / name for page in PAGES for name in _BARE_PAGE.findall(page.read_text())}
    found = {page for page in PAGES if page in linked | named or page.parent in linked}
    assert {str(page.relative_to(ROOT)) for page in PAGES if page not in found} == {"README.md"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see vmm/no_such.py.", ["vmm/no_such.py"]),
        ("see docs/formats/events.md, tests/nowhere/", ["tests/nowhere/"]),
        ("as `vmm.errors.VmmError`; `vmm.nowhere`", ["vmm.nowhere"]),
        ("base.errors.NoSuchError, base.errors.CellblockError.code", ["base.errors.NoSuchError"]),
        ("vcpu_worker.runner.Runner.walk", ["vcpu_worker.runner.Runner.walk"]),
        ("vmm/*.py, jailer/seccomp/*.policy, tests/kvm/test_worker_*, vmm/*.rs", ["vmm/*.rs"]),
        ("jailer/seccomp/build/ROLE-KEY.bpf, jailer/walls/ROLE.txt", ["jailer/walls/ROLE.txt"]),
        ("lab.md, ../lab/nothing.py, https://example.org/vmm/nothing", []),
        ("formats/no-such-page.md", ["docs/formats/no-such-page.md"]),
    ],
)
def test_the_check_sees_what_it_should(text, names):
    assert list(missing(text)) == names


def test_the_check_sees_broken_links(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading, two\n[a](#one-heading-two) [b](#none) [c](gone.md) [d](https://example.org)\n")
    assert list(broken_links(page)) == ["#none", "gone.md"]
