"""The table of the API asked of the real program, before the start, while a guest runs, and while it is paused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from lab.client import launch_unjailed
from tests.api_table import ROWS, STATE_CHANGES
from tests.guests.build import build
from tests.harness.api_client import Client


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
