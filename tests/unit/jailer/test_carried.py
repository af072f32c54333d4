"""Modules that are carried: all of them can be loaded where there are no files, and no start loads one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devtool.project import LAUNCHERS, PYTHON, ROOT
from jailer import carried, pack

#: An interpreter as the launchers start it, whose template is loaded.
LAUNCH = (LAUNCHERS / "firecracker").read_text().partition("from jailer.firecracker")[0]
TEMPLATE = f"""{LAUNCH}
import sys
from jailer import carried, pack, template
{{before}}
from base import lean_msgpack, lean_zmq
lean_zmq.install()
lean_msgpack.install()
template.load_roles(kernel_cache=True)
"""
#: Nothing but what is carried and what the interpreter has in itself is found from here on.
NO_FILES = """
template.pack.remove()
sys.meta_path[:] = [each for each in sys.meta_path if getattr(each, "__name__", "") != "PathFinder"]
"""


def _run(code: str) -> str:
    done = subprocess.run([PYTHON, "-IS", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("before", ["pack.install()", ""], ids=["from the pack", "from files"])
def test_everything_that_is_carried_can_be_loaded_without_a_file(before: str) -> None:
    code = f"""{TEMPLATE.format(before=before)}{NO_FILES}
names = carried.FINDER.names()
for name in names:
    __import__(name)
    assert sys.modules[name].__spec__.loader is carried.FINDER, name
assert not carried.FINDER.names()
print(*names)
"""
    loaded = set(_run(code).split())
    assert {"virtio", "virtio.block.uring_engine", "virtio.entropy", "device_cell.main"} <= loaded
    assert {"vmm.devices.transport", "vmm.devices.transport.mmio"} <= loaded


def test_a_start_loads_none_of_them() -> None:
    code = f"""{TEMPLATE.format(before="pack.install()")}
print(*[name for name in sys.modules if name.startswith({carried.CARRIED!r})])
"""
    assert _run(code).split() == []


def test_every_one_has_its_code_and_its_source() -> None:
    code = f"""{TEMPLATE.format(before="pack.install()")}{NO_FILES}
import virtio.block
import virtio.queue
print(virtio.__path__[0], virtio.block.__path__[0], virtio.queue.__file__)
"""
    paths = [str(ROOT / path) for path in ("virtio", "virtio/block", "virtio/queue.py")]
    assert _run(code).split() == paths


def test_an_edited_module_is_carried_as_its_source_says(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "edited"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("value = 'of the source'\n")
    monkeypatch.setattr(carried, "_ROOT", str(tmp_path))
    monkeypatch.setattr(carried, "CARRIED", ("edited",))
    finder = carried.CarriedFinder()
    monkeypatch.setattr(carried, "FINDER", finder)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    carried.carry()
    assert finder.names() == ("edited", "edited.part")
    (package / "part.py").unlink()
    module = __import__("edited.part", fromlist=["value"])
    monkeypatch.delitem(sys.modules, "edited.part")
    monkeypatch.delitem(sys.modules, "edited")
    assert module.value == "of the source"


def test_a_name_of_nothing_is_carried_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = carried.CarriedFinder()
    monkeypatch.setattr(carried, "FINDER", finder)
    monkeypatch.setattr(carried, "CARRIED", ("vmm.no_such_room", "no_such_package.part"))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    carried.carry()
    assert finder.names() == ()
    assert finder.find_spec("vmm.no_such_room") is None


def test_what_is_not_in_a_pack_is_not_taken_from_it() -> None:
    assert pack.code_of("no_such_module") is None
