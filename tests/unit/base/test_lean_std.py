"""signal and socket without their enumerations: the same numbers, names and sockets."""

from __future__ import annotations

import signal as standard_signal
import socket as standard_socket
import subprocess

import pytest

from base import lean_std
from devtool.project import PYTHON, ROOT


@pytest.mark.parametrize("number", range(1, 32))
def test_names_of_signals_are_those_of_the_standard_library(number):
    try:
        expected = standard_signal.Signals(number).name
    except ValueError:  # SIGSTKFLT has no name in Python 3.11
        expected = f"real-time signal {number}"
    assert lean_std.signal_name(number) == expected


def test_what_has_no_name_is_called_real_time():
    assert lean_std.signal_name(40) == "real-time signal 40"


def test_accept_makes_a_plain_blocking_socket_that_is_not_inherited(tmp_path):
    listener = lean_std.socket.socket(lean_std.socket.AF_UNIX, lean_std.socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)
    client = standard_socket.socket(standard_socket.AF_UNIX, standard_socket.SOCK_STREAM)
    client.connect(str(tmp_path / "socket"))
    accepted, _ = listener.accept()
    try:
        client.sendall(b"hello")
        assert accepted.recv(16) == b"hello"
        assert accepted.getblocking()
        assert accepted.family == standard_socket.AF_UNIX
        with open(f"/proc/self/fdinfo/{accepted.fileno()}") as file:
            flags = next(line.split()[1] for line in file if line.startswith("flags"))
        assert int(flags, 8) & 0o2000000, "close-on-exec"
    finally:
        for each in (client, accepted, listener):
            each.close()


def test_a_pair_closes_with_its_block():
    ours, theirs = lean_std.socket.socketpair(lean_std.socket.AF_UNIX, lean_std.socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"hello")
        assert theirs.recv(16) == b"hello"
        assert theirs.getsockopt(lean_std.socket.SOL_SOCKET, standard_socket.SO_TYPE) == lean_std.socket.SOCK_SEQPACKET
    assert ours.fileno() == theirs.fileno() == -1


def test_the_enumerations_stay_out_of_the_programs():
    code = """
import sys
from base import lean_zmq
lean_zmq.install()
import jailer.direct, jailer.firecracker, jailer.launch, jailer.settings, jailer.template
jailer.template.load_roles()
print(*sys.modules)
"""
    done = subprocess.run([PYTHON, "-IS", "-c", f"import sys; sys.path[:0] = {paths()!r}\n{code}"],
                          cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)  # fmt: skip
    loaded = set(done.stdout.split())
    assert "vmm.main" in loaded
    kept_out = {
        "contextlib", "enum", "functools", "hashlib", "json", "lzma", "platform", "re", "selectors", "signal", "socket",
        "threading", "typing", "weakref",
    }  # fmt: skip
    assert not loaded & kept_out


def paths() -> list[str]:
    site_packages = next((ROOT / ".venv" / "lib").glob("python3.*/site-packages"))
    return [str(ROOT), str(site_packages)]
