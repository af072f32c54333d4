"""The table of the API asked of the real program, before the start, while a guest runs, and while it is paused."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from lab.client import launch_unjailed
from tests.api_table import ROWS, STATE_CHANGES
from tests.guests.build import build


class Client:
    """One kept connection; replies are compared byte for byte as far as they are the same for all."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(300)
        self._connection.connect(str(path))
        self._file = self._connection.makefile("rb")

    def send(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        """Return status and body (None without one); checks status line and headers."""
        data = b"" if body is None else body.encode()
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        self._connection.sendall(f"{method} {path} HTTP/1.1\r\n{length}\r\n".encode() + data)
        status_line = self._file.readline()
        assert status_line.startswith(b"HTTP/1.1 ")
        assert status_line.endswith(b" \r\n"), status_line
        names, length_of_body = [], 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            names.append(name)
            if name == "Content-Length":
                length_of_body = int(value)
        status = int(status_line.split()[1])
        content = [] if status == 204 else ["Content-Type", "Content-Length"]
        assert [name for name in names if name != "Deprecation"] == ["Server", "Connection", *content]
        text = self._file.read(length_of_body)
        return status, json.loads(text) if text else None

    def close(self) -> None:
        self._file.close()
        self._connection.close()


@pytest.mark.parametrize("state", ["before", "running", "paused"])
def test_the_program_answers_as_the_table_says(state: str, tmp_path: Path) -> None:
    kernel = str(build("spin"))
    with launch_unjailed(tmp_path, ["--id", "table"]) as vm:
        vm.wait_for_api()
        client = Client(vm.api_socket)
        if state != "before":
            assert client.send("PUT", "/boot-source", json.dumps({"kernel_image_path": kernel})) == (204, None)
            assert client.send("PUT", "/actions", '{"action_type": "InstanceStart"}') == (204, None)
        if state == "paused":
            assert client.send("PATCH", "/vm", '{"state": "Paused"}') == (204, None)
        wrong = []
        shown = client.send("GET", "/vm/config")
        for row in (*ROWS, *[row for row in STATE_CHANGES if getattr(row, state) != -1]):
            body = row.body and row.body.replace("KERNEL", kernel).replace("METRICS", str(tmp_path / "metrics"))
            status, reply = client.send(row.method, row.path, body)
            got = status if status < 400 else reply["fault_message"]
            expected = getattr(row, state)
            before, shown = shown, client.send("GET", "/vm/config")
            if got != expected:
                wrong.append(f"{row.name}\n  got      {got}\n  expected {expected}")
            elif status >= 400 and shown != before:
                wrong.append(f"{row.name}: refused, and something has changed")
        assert not wrong, "\n".join(wrong)
        name = {"before": "Not started", "running": "Running", "paused": "Paused"}[state]
        assert client.send("GET", "/")[1] == {
            "id": "table", "state": name, "vmm_version": "1.17.0-dev", "app_name": "Firecracker",
        }  # fmt: skip
        client.close()
        vm.process.terminate()
        assert vm.wait() == -signal.SIGTERM
