"""The pack of byte code: what is found in it, and when it stands aside."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from typing import Any

import pytest

from devtool.project import LAUNCHERS, PRODUCT, PYTHON, ROOT
from jailer import pack

CODE = "value = 'from the pack'\nname, file, package = __name__, __file__, __package__\n"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A package with a module, whose sources say something else than the pack, which is installed."""
    index: pack.Index = {}
    code = b""
    for name, source in (("packed", tmp_path / "packed/__init__.py"), ("packed.inner", tmp_path / "packed/inner.py")):
        source.parent.mkdir(exist_ok=True)
        source.write_text("value = 'from the source'\n")
        status = source.stat()
        compiled = marshal.dumps(compile(CODE, str(source), "exec"))
        is_package = source.name == "__init__.py"
        index[name] = (str(source), is_package, status.st_mtime_ns, status.st_size, len(code), len(compiled))
        code += compiled
    path = tmp_path / "pack"
    path.write_bytes(pack.join(index, code))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield path
    pack.remove()
    for name in index:
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def test_modules_come_out_of_the_pack_as_they_would_from_their_files(modules):
    pack.install(str(modules))
    inner, package = load("packed.inner"), load("packed")
    assert (inner.value, inner.name, inner.package) == ("from the pack", "packed.inner", "packed")
    assert inner.file == inner.__file__ == str(modules.parent / "packed/inner.py")
    assert (package.value, package.package, package.inner) == ("from the pack", "packed", inner)
    assert package.__path__ == [str(modules.parent / "packed")]


def test_a_source_that_was_changed_is_read_itself(modules):
    source = modules.parent / "packed/inner.py"
    source.write_text("value = 'changed'\n")
    pack.install(str(modules))
    assert (load("packed.inner").value, load("packed").value) == ("changed", "from the pack")


def test_a_source_of_the_same_length_with_another_time_is_read_itself(modules):
    source = modules.parent / "packed/inner.py"
    os.utime(source, ns=(0, 0))
    pack.install(str(modules))
    assert load("packed.inner").value == "from the source"


def test_after_its_removal_nothing_is_found_in_it(modules):
    pack.install(str(modules))
    pack.remove()
    assert load("packed.inner").value == "from the source"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:11],
        lambda content: content[:20],
        lambda content: b"CBPACK0\n" + content[8:],
        lambda content: content[:8] + b"\0\0\0\0" + content[12:],
        lambda content: content[:12] + b"\xff\xff\xff\xff" + content[16:],
        lambda content: content[:12] + b"\5\0\0\0" + content[16:],
    ],
    ids=["empty", "magic", "index", "format", "interpreter", "length", "unreadable"],
)
def test_a_pack_that_is_none_stands_aside(modules, damage):
    modules.write_bytes(damage(modules.read_bytes()))
    finders = list(sys.meta_path)
    pack.install(str(modules))
    assert sys.meta_path == finders
    assert load("packed.inner").value == "from the source"


def test_no_pack_is_no_error(tmp_path):
    finders = list(sys.meta_path)
    pack.install(str(tmp_path / "nothing"))
    assert sys.meta_path == finders


def test_a_start_loads_the_product_out_of_it_until_it_is_removed():
    launcher = (LAUNCHERS / "firecracker").read_text().partition("from jailer.firecracker")[0]
    code = f"""{launcher}
import sys
from jailer import pack
pack.install()
from jailer import direct, template
template.load_roles()
ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in {PRODUCT!r}]
others = {{module.__name__ for module in ours if type(module.__loader__) is not pack.PackFinder}}
assert others == {{"jailer", "jailer.pack"}}, others  # loaded before it
assert len(ours) > 150
pack.remove()
import cellblock.main
assert type(sys.modules["cellblock.main"].__loader__) is not pack.PackFinder
assert not direct.__loader__._code and not direct.__loader__._index
"""
    subprocess.run([PYTHON, "-IS", "-c", code], cwd=ROOT, check=True)
