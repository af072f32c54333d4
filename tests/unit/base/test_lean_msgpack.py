"""msgpack's core without its Python layer: what the messages' tests say of it, and that nothing else is loaded."""

from __future__ import annotations

import subprocess

import pytest

from devtool.project import PYTHON, ROOT

TESTS = ["tests/unit/ipc/test_messages.py", "tests/fuzz/test_ipc_fuzz.py"]
INSTALLED = "from base import lean_msgpack; assert lean_msgpack.install(); import msgpack; "


def run(code: str) -> str:
    command = [str(PYTHON), "-IS", "-c", f"import sys; sys.path[:0] = {paths()!r}\n{code}"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return str(done.stdout)


def paths() -> list[str]:
    return [str(ROOT), *(str(path) for path in (ROOT / ".venv" / "lib").glob("python3.*/site-packages"))]


@pytest.mark.slow
def test_messages_are_the_same_on_it():
    options = ["-p", "tests.harness.with_lean_msgpack", "-p", "no:xdist", "-q", *TESTS]
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", *options], cwd=ROOT, check=False, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_python_layer_stays_out():
    loaded = set(run(INSTALLED + "import ipc.schema; print(*sys.modules)").split())
    assert "msgpack._cmsgpack" in loaded
    assert not {"datetime", "collections"} & loaded


@pytest.mark.parametrize(
    "frame",
    [
        "d6ff00000000",  # fixext 4, type -1: a time
        "d7ff0000000000000000",
        "c70cff000000000000000000000000",
        "d40100",  # fixext 1 of a type that nobody knows
        "c7000100",
        "c1",
    ],
)
@pytest.mark.parametrize("installed", [INSTALLED, ""])
def test_extension_types_and_times_are_refused(installed, frame):
    code = f"""
from ipc.schema import unpack
from ipc.errors import MessageError
try:
    print(unpack(bytes.fromhex("{frame}")))
except MessageError:
    print("refused")
"""
    assert run(installed + code) == "refused\n"


def test_what_needs_an_extension_type_cannot_be_packed():
    code = "\nfrom ipc.schema import pack\nfrom ipc.errors import MessageError\n"
    code += "try: pack(object())\nexcept MessageError as error: print(error)\n"
    assert run(INSTALLED + code) == run(code) == "cannot be serialised: TypeError\n"


def test_it_steps_back_where_msgpack_is_loaded_or_unknown():
    loaded = run("import msgpack; from base import lean_msgpack; print(lean_msgpack.install(), msgpack.Timestamp)")
    assert loaded.startswith("False <class")
    unknown = "from base import lean_msgpack; lean_msgpack._CORE = 'msgpack.nothing'; print(lean_msgpack.install()); "
    assert run(unknown + "import msgpack; print(msgpack.Timestamp.__module__)") == "False\nmsgpack.ext\n"
