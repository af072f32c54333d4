"""What several test files need is a harness: no test file imports another one, and the harnesses import none."""

from __future__ import annotations

from devtool.project import ROOT
from tests.harness.source_tree import SourceTree, differences
from tests.unit.house import exceptions


def imports_of_tests(tree: SourceTree) -> dict[tuple[str, str], str]:
    """Return (file, test module that it imports) → where it does.

    Tests may be imported to run them in another place, and then nothing but them: names that begin with ``test_``.
    """
    found: dict[tuple[str, str], str] = {}
    for path in tree.files:
        for name in tree.imports(path):
            module = name.full if name.full in tree.modules else name.module
            parts = module.split(".")
            is_test = parts[0] == "tests" and (parts[-1].startswith("test_") or parts[-1] == "conftest")
            if is_test and (module == name.full or not name.name.startswith("test_")):
                found.setdefault((str(path), module), f"{path}:{name.line}: imports {name.full}")
    return found


def test_no_test_file_imports_another():
    found = imports_of_tests(SourceTree(ROOT, ["tests", "bench", "lab", "devtool"]))
    assert not (wrong := differences(found, exceptions.TEST_IMPORTS, "exceptions.TEST_IMPORTS")), wrong


def test_an_import_of_a_test_file_is_found(tmp_path):
    files = {
        "tests/harness/tool.py": "from tests.conftest import X",
        "tests/kvm/test_a.py": "from tests.harness.tool import y\nfrom tests.kvm.test_b import helper",
        "tests/kvm/test_b.py": "from tests.kvm import test_a",
        "tests/lab/test_c.py": "from tests.kvm.test_a import test_one, test_two",
        "tests/conftest.py": "from tests.harness.tool import X",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(imports_of_tests(SourceTree(tmp_path, ["tests"]))) == {
        ("tests/harness/tool.py", "tests.conftest"),
        ("tests/kvm/test_a.py", "tests.kvm.test_b"),
        ("tests/kvm/test_b.py", "tests.kvm.test_a"),
    }
