"""Clients that are not ours, against the real program: none is ever out of step, and none is turned away."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from lab.client import launch_unjailed, request
from tests.clients.build import go_client, node_client
from tests.harness.run_options import Scale

COMMANDS = {
    "go": lambda: go_client("in_step"),
    "node http": lambda: node_client("in_step"),
    "node fetch": lambda: node_client("in_step"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bodies_of_unknown_length(name: str, tmp_path: Path) -> None:
    """Go and Node send them in chunks, and expect one answer to each request, over one connection."""
    command = [*COMMANDS[name](), "SOCKET", "200", name.partition(" ")[2]]
    with launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        command[-3] = str(vm.api_socket)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "1\n"


@pytest.mark.soak("api")
def test_six_clients_with_a_connection_for_each_request(tmp_path: Path, scale: Scale) -> None:
    each = scale(200, 5_000)
    with launch_unjailed(tmp_path, ["--level", "Off"]) as vm:
        vm.wait_for_api()
        pids = [_fork_client(vm.api_socket, each) for _ in range(6)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0] * 6
        assert request(vm.api_socket, "GET", "/version").status == 200


def _fork_client(path: Path, count: int) -> int:
    """Start a process that sends requests, each on a connection of its own; it ends with 0 if all were executed."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(str(path))
                client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if not client.recv(4096).startswith(b"HTTP/1.1 200 "):
                    os._exit(2)
        code = 0
    finally:
        os._exit(code)
