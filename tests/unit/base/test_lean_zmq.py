"""pyzmq's core without its Python layer: what the channel's tests say of it, and that nothing else is loaded."""

from __future__ import annotations

import re
import subprocess

import pytest
import zmq

from base import lean_zmq
from devtool.project import PYTHON, ROOT

TESTS = [f"tests/unit/ipc/test_channel{part}.py" for part in ("", "_hostile", "_faults")]
INSTALLED = "from base import lean_zmq; assert lean_zmq.install(); import zmq; "


def run(code: str) -> str:
    command = [str(PYTHON), "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return str(done.stdout)


@pytest.mark.slow
def test_the_channel_is_the_same_on_it():
    options = ["-p", "tests.harness.with_lean_zmq", "-p", "no:xdist", "-q", *TESTS]
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", *options], cwd=ROOT, check=False, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", lean_zmq._NUMBERS)
def test_numbers_are_those_of_pyzmq(name):
    assert getattr(lean_zmq, name) == getattr(zmq, name)


def test_the_product_uses_no_name_that_is_not_there():
    used = {
        name
        for package in ("ipc", "vmm", "vcpu_worker", "device_cell", "jailer")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "lean_zmq.py"
        for name in re.findall(r"\bzmq\.(\w+)", path.read_text())
    }
    assert "Context" in used
    there = run(INSTALLED + "print(*dir(zmq))").split()
    assert not used - set(there)


def test_the_python_layer_stays_out():
    loaded = run(INSTALLED + "import sys; print(*sys.modules)").split()
    assert "zmq.backend.cython._zmq" in loaded
    assert not {"zmq.sugar", "zmq.utils.jsonapi"} & set(loaded)


def test_errors_are_those_of_pyzmq():
    code = """
context = zmq.Context()
socket = context.socket(zmq.PAIR)
for action in (lambda: socket.recv(zmq.DONTWAIT), lambda: socket.bind("ipc:///nowhere/x"), lambda: socket.bind("x")):
    try:
        action()
    except zmq.ZMQError as error:
        print(type(error).__name__, error.errno, error.strerror.partition(" (addr=")[0], sep="|")
assert socket.getsockopt(zmq.FD) > 2
assert socket.getsockopt(zmq.EVENTS) == 0
socket.setsockopt(zmq.MAXMSGSIZE, 1 << 40)
assert socket.getsockopt(zmq.MAXMSGSIZE) == 1 << 40
context.destroy(linger=0)
assert socket.closed
"""
    assert run(INSTALLED + code) == run("import zmq\n" + code)


def test_it_steps_back_where_pyzmq_is_loaded_or_unknown():
    loaded = run("import zmq; from base import lean_zmq; print(lean_zmq.install(), zmq.sugar)")
    assert loaded.startswith("False <module")
    unknown = "from base import lean_zmq; lean_zmq._CORE = 'zmq.nothing'; print(lean_zmq.install()); import zmq; "
    assert run(unknown + "print(zmq.sugar.__name__)") == "False\nzmq.sugar\n"
