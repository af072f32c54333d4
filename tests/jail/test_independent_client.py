"""`firecracker` and `jailer` driven by a client that is not ours, with requests made from docs/openapi.yaml.

Requests come from schemathesis, travel by `requests` over a UNIX socket, and each answer is checked against the
description: configure, start, pause, resume, stop; daemonized or not, with and without a pid namespace; and un-jailed.
"""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from devtool.project import ROOT
from lab.client import launch_unjailed
from tests.guests.build import build
from tests.harness.http import BASE_URL, session
from tests.harness.jail import GID, UID, JailedMicrovm, is_alive, microvm, status, wait_for

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
#: What a generated body needs that no schema can know: files, and a machine that this host can make.
CONFIGURATION: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "/logger", {"log_path": "out/log", "module": None, "level": "Debug"}),
    ("PUT", "/metrics", {"metrics_path": "out/metrics", "emit_id": True}),
    ("PUT", "/machine-config",
     {"vcpu_count": 1, "mem_size_mib": 64, "smt": False, "cpu_template": None, "huge_pages": "None",
      "vcpu_placement": None, "vcpu_affinity": None}),
    ("PATCH", "/machine-config",
     {"vcpu_count": 1, "mem_size_mib": 64, "smt": False, "cpu_template": None, "huge_pages": "None",
      "vcpu_placement": None, "vcpu_affinity": None}),
    ("PUT", "/boot-source", {"kernel_image_path": "KERNEL", "initrd_path": None, "boot_args": "0"}),
    ("PUT", "/serial", {"serial_out_path": "out/serial", "rate_limiter": None}),
    ("PUT", "/mmds", {}),
]  # fmt: skip


class Client:
    """Makes requests from the description and checks the answers against it."""

    def __init__(self, socket: Path) -> None:
        import schemathesis
        from schemathesis import checks
        from schemathesis.specs.openapi import checks as openapi_checks

        self._schema = schemathesis.openapi.from_dict(DOCUMENT)
        self._session = session(socket)
        self._checks = [
            checks.not_a_server_error,
            openapi_checks.status_code_conformance,
            openapi_checks.content_type_conformance,
            openapi_checks.response_schema_conformance,
        ]

    def generated(self, method: str, path: str, fixed: dict[str, Any], examples: int = 3) -> None:
        """Send bodies that the description allows, ``fixed`` in them; each has to succeed, or to be refused twice."""
        operation = self._schema[path][method]

        @hypothesis.seed(1)
        @settings(
            max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body = {**case.body, **fixed}
            response = self._call(case)
            again = path == "/metrics" and "Reinitialization" in response.text
            assert response.status_code == 204 or again, (method, path, case.body, response.text)

        send()

    def send(self, method: str, path: str, body: Any = None, expected: int = 204) -> Any:
        """Send one request; return what came back."""
        import schemathesis

        body = schemathesis.core.NOT_SET if body is None else body
        media_type = None if body is schemathesis.core.NOT_SET else "application/json"
        case = self._schema[path][method].Case(body=body, media_type=media_type)
        response = self._call(case)
        assert response.status_code == expected, response.text
        return response.json() if expected == 200 else None

    def _call(self, case: Any) -> Any:
        response = case.call(base_url=BASE_URL, session=self._session)
        case.validate_response(response, checks=self._checks)
        return response

    def close(self) -> None:
        self._session.close()


def configure_to_resume(client: Client, kernel: str, alive: Callable[[], bool]) -> None:
    """The whole life but its end."""
    assert client.send("GET", "/", expected=200)["state"] == "Not started"
    for method, path, fixed in CONFIGURATION:
        client.generated(
            method, path, {**fixed, **({"kernel_image_path": kernel} if "kernel_image_path" in fixed else {})}
        )
    shown = client.send("GET", "/vm/config", expected=200)
    assert shown["boot-source"] == {"kernel_image_path": kernel, "initrd_path": None, "boot_args": "0"}
    assert client.send("GET", "/machine-config", expected=200) == shown["machine-config"]
    client.send("PUT", "/actions", {"action_type": "InstanceStart"})
    assert client.send("GET", "/", expected=200)["state"] == "Running"
    for state, name in (("Paused", "Paused"), ("Resumed", "Running")):
        client.send("PATCH", "/vm", {"state": state})
        assert client.send("GET", "/", expected=200)["state"] == name
    client.send("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
    client.send("PUT", "/actions", {"action_type": "FlushMetrics"})
    client.send("PUT", "/actions", {"action_type": "InstanceStart"}, expected=400)
    (vcpu,) = client.send("GET", "/vcpus", expected=200)
    assert vcpu["index"] == 0
    assert vcpu["state"] == "running"
    assert alive()


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def check_files(jailed: JailedMicrovm) -> None:
    """Log, metrics, console and socket are in the jail, and the microVM's own."""
    out = jailed.root / "out"
    log = (out / "log").read_text()
    assert 'The API server received a Put request on "/actions" with body' in log
    lines = [json.loads(line) for line in (out / "metrics").read_text().splitlines()]
    assert [line["id"] for line in lines] == [jailed.id] * 2
    assert (out / "serial").read_text().startswith("spinning")
    for name in ("log", "metrics", "serial"):
        assert owner_and_mode(out / name)[:2] == (UID, GID), name
    assert owner_and_mode(jailed.api_socket) == (UID, GID, 0o755)
    assert stat.S_ISSOCK(jailed.api_socket.lstat().st_mode)


@pytest.mark.slow
@pytest.mark.parametrize("new_pid_ns", [False, True], ids=["", "new-pid-ns"])
@pytest.mark.parametrize("daemonize", [False, True], ids=["", "daemonize"])
def test_the_jailer_from_configuration_to_stop(base: Path, daemonize: bool, new_pid_ns: bool) -> None:
    options = [*(["--daemonize"] if daemonize else []), *(["--new-pid-ns"] if new_pid_ns else [])]
    with microvm(base, *options, arguments=()) as jailed:
        (jailed.root / "out").mkdir(parents=True)
        os.chown(jailed.root / "out", UID, GID)
        jailed.add_guest("spin")
        jailed.start(umask=0o022).wait_up()
        if daemonize or new_pid_ns:
            assert jailed.process.wait(30) == 0  # the program that was started has gone; the pid file says who is left
        else:
            assert jailed.pid == jailed.process.pid
        pid = jailed.pid
        assert Path(f"/proc/{pid}/comm").read_text() == "firecracker\n"
        assert status(pid)["NSpid"].split()[1:] == (["1"] if new_pid_ns else [])
        client = Client(jailed.api_socket)
        configure_to_resume(client, "/kernel", lambda: is_alive(pid))
        check_files(jailed)
        client.close()
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not is_alive(pid), "the end")
        if not (daemonize or new_pid_ns):
            assert jailed.process.wait(30) == -signal.SIGTERM
        log = (jailed.root / "out" / "log").read_text()
        assert log.splitlines()[-1].endswith("Firecracker exiting with error. exit_code=143")
        # Nothing is written after the end, and what was written stays.
        assert len((jailed.root / "out" / "metrics").read_text().splitlines()) == 3


@pytest.mark.slow
def test_firecracker_from_configuration_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with launch_unjailed(tmp_path, ["--id", "direct"]) as vm:
        vm.wait_for_api()
        client = Client(vm.api_socket)
        configure_to_resume(client, str(build("spin")), lambda: vm.process.poll() is None)
        client.close()
        vm.process.terminate()
        assert vm.wait() == -signal.SIGTERM
    assert owner_and_mode(vm.api_socket)[:2] == (os.getuid(), os.getgid())
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics").read_text().splitlines()]
    assert [line["id"] for line in metrics] == ["direct"] * 3
    assert (tmp_path / "out" / "serial").read_text().startswith("spinning")
