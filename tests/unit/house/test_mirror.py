"""tests/unit mirrors the product: who looks for the tests of a file finds them by its path."""

from __future__ import annotations

from pathlib import Path

from devtool.project import ROOT
from tests.harness.source_tree import differences
from tests.unit.house import exceptions

#: Tests of the tree itself: this folder.
OF_THE_TREE = "house"


def counterpart(root: Path, test: Path) -> Path | None:
    """Return the product's file or folder that a unit test mirrors; both paths are relative to ``root``.

    ``tests/unit/PACKAGE/ROOM/test_NAME.py`` and ``test_NAME_subject.py`` mirror ``PACKAGE/ROOM/NAME.py``, or the whole
    folder ``PACKAGE/ROOM/NAME``. What stands below tests/ itself (the harnesses, the guests) is mirrored as well.
    """
    place = test.relative_to("tests/unit")
    words = place.stem.removeprefix("test_").split("_")
    for room in (place.parent, Path("tests") / place.parent):
        for length in range(len(words), 0, -1):
            name = "_".join(words[:length])
            for candidate in (room / f"{name}.py", room / name):
                if (root / candidate).is_file() or (root / candidate / "__init__.py").is_file():
                    return candidate
    return None


def unmirrored(root: Path) -> dict[str, str]:
    """Return the unit tests that mirror nothing."""
    tests = [path.relative_to(root) for path in sorted((root / "tests/unit").rglob("test_*.py"))]
    return {
        str(test): f"{test}: no file of the product has this name"
        for test in tests
        if test.parts[2] != OF_THE_TREE and counterpart(root, test) is None
    }


def test_every_unit_test_mirrors_a_file_of_the_product():
    found = unmirrored(ROOT)
    assert not (wrong := differences(found, exceptions.UNMIRRORED, "exceptions.UNMIRRORED")), wrong


def test_what_mirrors_nothing_is_found(tmp_path):
    for name in ("p/room/__init__.py", "p/room/part.py", "p/room/inner/__init__.py", "tests/harness/tool.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    good = ("p/room/test_part.py", "p/room/test_part_of_it.py", "p/room/test_inner.py", "p/test_room.py",
            "harness/test_tool.py", "house/test_anything.py")  # fmt: skip
    bad = ("p/room/test_parts.py", "p/test_part.py", "q/test_part.py", "test_part.py")
    for name in good + bad:
        (tmp_path / "tests/unit" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests/unit" / name).write_text("")
    assert set(unmirrored(tmp_path)) == {f"tests/unit/{name}" for name in bad}
