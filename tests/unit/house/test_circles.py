"""Nothing imports itself by a detour: not a module, and not a folder. Imports for the type checker count."""

from __future__ import annotations

from collections import defaultdict

import pytest

from devtool.project import CHECKED, ROOT
from tests.harness.source_tree import SourceTree, circles, differences
from tests.unit.house import exceptions


def module_circles(tree: SourceTree) -> dict[tuple[str, ...], str]:
    """Return the modules that form a circle → the imports between them."""
    arrows: dict[str, dict[str, str]] = defaultdict(dict)
    for source, target, place in tree.arrows():
        arrows[source].setdefault(target, place)
    return {group: _between(group, arrows) for group in circles(arrows)}


def room_circles(tree: SourceTree) -> dict[tuple[str, ...], str]:
    """Return the members of one folder that form a circle → the imports between them. A folder stands for all in it."""
    folders: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for source, target, place in tree.arrows():
        ours, theirs = source.split("."), target.split(".")
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same:  # between packages, test_packages.py decides
            arrows = folders[".".join(ours[:same])]
            arrows[".".join(ours[: same + 1])].setdefault(".".join(theirs[: same + 1]), place)
    return {group: _between(group, arrows) for arrows in folders.values() for group in circles(arrows)}


def _between(group: tuple[str, ...], arrows: dict[str, dict[str, str]]) -> str:
    return "; ".join(
        f"{place}: {source} → {target}"
        for source in group
        for target, place in arrows[source].items()
        if target in group
    )


def test_modules_form_no_circle():
    found = module_circles(SourceTree(ROOT, CHECKED))
    assert not (wrong := differences(found, exceptions.MODULE_CIRCLES, "exceptions.MODULE_CIRCLES")), wrong


def test_rooms_form_no_circle():
    found = room_circles(SourceTree(ROOT, CHECKED))
    assert not (wrong := differences(found, exceptions.ROOM_CIRCLES, "exceptions.ROOM_CIRCLES")), wrong


@pytest.mark.parametrize(
    ("files", "modules", "rooms"),
    [
        ({"p/a.py": "from p import b", "p/b.py": "from p.c import x", "p/c.py": ""}, [], []),
        ({"p/a.py": "from p import b", "p/b.py": "from p.a import x"}, [("p.a", "p.b")], [("p.a", "p.b")]),
        (
            {"p/a.py": "import p.b", "p/b.py": "def f():\n    import p.c", "p/c.py": "if T:\n    from p import a"},
            [("p.a", "p.b", "p.c")],
            [("p.a", "p.b", "p.c")],
        ),
        (
            {"p/r/a.py": "import p.s.a", "p/s/a.py": "", "p/s/b.py": "import p.r.b", "p/r/b.py": ""},
            [],
            [("p.r", "p.s")],
        ),
        ({"p/a.py": "import q.a", "q/b.py": "import p.b", "q/a.py": "", "p/b.py": ""}, [], []),
    ],
)
def test_a_circle_is_found(tmp_path, files, modules, rooms):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = SourceTree(tmp_path, ["p", "q"])
    assert list(module_circles(tree)) == modules
    assert list(room_circles(tree)) == rooms
