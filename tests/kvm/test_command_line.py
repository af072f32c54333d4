"""The command line of the program itself: what each flag does, what is refused, exit codes, the log's lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab.client import FIRECRACKER, launch_unjailed, request
from tests.guests.build import build
from tests.harness.api_client import Client

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FIRECRACKER, *arguments], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


@pytest.mark.parametrize(
    ("flag", "output"),
    [
        ("--version", "Firecracker v1.17.0-dev\n"),
        ("--snapshot-version", "v11.0.0\n"),
    ],
)
def test_questions(flag, output):
    done = run(flag)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_keeps_our_additions_apart(flag):
    done = run(flag)
    assert done.returncode == 0
    theirs, ours = done.stdout.split("\nFlags of Cellblock:\n")
    for name in ("api-sock", "config-file", "no-api", "metadata", "boot-timer", "mmds-size-limit", "enable-pci"):
        assert f"\n  --{name}" in theirs
    assert "--kernel-cache" in ours


def _arguments_text(text: str) -> str:
    return f"Arguments parsing error: {text} \n\nFor more information try --help."


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("--foo", 153,
         _arguments_text("Found argument 'foo' which wasn't expected, or isn't valid in this context.")),
        ("foo", 153, _arguments_text("Found argument 'foo' which wasn't expected, or isn't valid in this context.")),
        ("--id", 153, _arguments_text("The argument 'id' requires a value, but none was supplied.")),
        ("--api-sock --id a", 153, _arguments_text("The argument 'api-sock' requires a value, but none was supplied.")),
        ("--id a --id b", 153, _arguments_text("The argument 'id' was provided more than once.")),
        ("--no-api", 153, _arguments_text("Argument 'config-file' required, but not found.")),
        ("--seccomp-filter f --no-seccomp", 153,
         _arguments_text("Argument 'no-seccomp' cannot be used together with argument 'seccomp-filter'.")),
        ("--id a_b", 153, "Invalid instance ID: Invalid char (_) at position 1"),
        ("--level loud", 152,
         ("Invalid value for logger level: Failed to parse string to level filter: loud."
          "Possible values: [Error, Warning, Info, Debug]")),
        ("--log-path /nix/log", 1, "Failed to open target file: No such file or directory (os error 2)"),
        ("--metrics-path /nix/m", 1,
         ("Cannot initialize the metrics system due to bad user input: No such file or directory (os error 2)")),
        ("--describe-snapshot /nix/s", 1,
         "When printing Snapshot Data format: Unable to open snapshot state file: No such file"),
        ("--api-sock /nix/s", 1,
         "Failed to bind and run the HTTP server: IO error: No such file or directory (os error 2)"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, code, text, tmp_path):
    extra = [] if "--api-sock" in arguments else ["--api-sock", str(tmp_path / "socket")]
    done = run(*arguments.split(), *(extra if code == 1 else []))
    assert done.returncode == code, done.stderr
    assert done.stderr.strip("\n").endswith(text) or text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "socket").exists() or code == 1


def test_a_socket_that_exists_is_refused(tmp_path):
    path = tmp_path / "taken"
    path.touch()
    done = run("--api-sock", str(path))
    assert done.returncode == 1
    assert f"Failed to open the API socket at: {path}. Check that it is not already used." in done.stderr + done.stdout
    assert path.stat().st_size == 0


def test_the_log_of_a_life(tmp_path):
    """Its first lines, what a request looks like, its last line; with level and origin."""
    path = tmp_path / "log"
    flags = ["--log-path", str(path), "--level", "dEbUg", "--show-level", "--show-log-origin", "--id", "a-log"]
    with launch_unjailed(tmp_path, flags) as vm:
        vm.wait_for_api()
        assert vm.api("PATCH", "/machine-config", {"mem_size_mib": 64}).status == 204
        assert vm.api("PUT", "/nothing", {}).status == 400
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.process.terminate()
        assert vm.wait() == -signal.SIGTERM
    lines = path.read_text().splitlines()
    form = re.compile(rf"{STAMP} \[a-log:(main|fc_api):(ERROR|WARN|INFO|DEBUG):[a-z_]+/[a-z_/]+\.py:\d+\] (.*)")
    matches = [form.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    said = [(match[1], match[2], match[3]) for match in matches if match]
    assert said[0] == ("main", "INFO", "Running Firecracker v1.17.0-dev")
    assert ("main", "INFO", f"Listening on API socket ({vm.api_socket}).") in said
    assert ("fc_api", "INFO", "API server started.") in said
    request_line = 'The API server received a Patch request on "/machine-config" with body "{\\"mem_size_mib\\": 64}".'
    assert ("fc_api", "INFO", request_line) in said
    refused = "Received Error. Status code: 400 Bad Request. Message: Invalid request method and/or path: PUT nothing."
    assert ("fc_api", "ERROR", refused) in said
    assert ("fc_api", "INFO", "The request was executed successfully. Status code: 204 No Content.") in said
    assert any(re.fullmatch(r"'pause vm' VMM action took \d+ us\.", text) for _, _, text in said)
    assert any(re.fullmatch(r"Total previous API call duration: \d+ us\.", text) for _, _, text in said)
    assert said[-1] == ("main", "ERROR", "Firecracker exiting with error. exit_code=143")


def test_the_payload_limit(tmp_path):
    with launch_unjailed(tmp_path, ["--http-api-max-payload-size", "250"]) as vm:
        vm.wait_for_api()
        client = Client(vm.api_socket)
        assert client.send("PUT", "/mmds", json.dumps({"a": "x" * 241})) == (204, None)
        assert len(json.dumps({"a": "x" * 241})) == 250
        reply = request(vm.api_socket, "GET", "/mmds")
        assert len(reply.body["a"]) == 241
        client._connection.sendall(b"PUT /mmds HTTP/1.1\r\nContent-Length: 260\r\n\r\n" + b"x" * 260)
        body = (
            b'{ "error": "Request payload with size 260 is larger than the limit of 250 allowed by server.\n'
            b'All previous unanswered requests will be dropped." }'
        )
        expected = (
            b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        ) + body
        assert client._file.read(len(expected)) == expected
        # The connection lives on, and the limit of the metadata is that of the payload.
        assert client.send("GET", "/version")[0] == 200
        assert client.send("PATCH", "/mmds", '{"b": "%s"}' % ("y" * 100)) == (
            413, {"fault_message": "MMDS limit exceeded error: The MMDS patch request doesn't fit."},
        )  # fmt: skip
        assert set(client.send("GET", "/mmds")[1]) == {"a"}
        client.close()


def test_the_limit_of_the_metadata(tmp_path):
    with launch_unjailed(tmp_path, ["--mmds-size-limit", "20"]) as vm:
        vm.wait_for_api()
        client = Client(vm.api_socket)
        exact = {"a": "x" * 12}
        assert len(json.dumps(exact, separators=(",", ":"))) == 20
        too_large = (413, {"fault_message": "MMDS limit exceeded error: The MMDS patch request doesn't fit."})
        assert client.send("PUT", "/mmds", '{"a": "%s"}' % ("x" * 13)) == too_large
        assert client.send("GET", "/mmds") == (200, {})
        assert client.send("PUT", "/mmds", json.dumps(exact, indent=8)) == (204, None)
        assert client.send("PATCH", "/mmds", '{"b": 1}') == too_large
        assert client.send("PATCH", "/mmds", '{"b": 1, "a": null}') == (204, None)
        assert client.send("GET", "/mmds") == (200, {"b": 1})
        client.close()


def document(**sections: Any) -> dict[str, Any]:
    return {
        "boot-source": {"kernel_image_path": str(build("spin")), "boot_args": "0"},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        **sections,
    }


def write(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_configuration_file_starts_the_machine(tmp_path):
    content = document(**{
        "logger": {"log_path": str(tmp_path / "log"), "level": "Info"},
        "metrics": {"metrics_path": str(tmp_path / "metrics"), "properties": {"rack": "7"}},
        "cpu-config": {"kvm_capabilities": []},
        "network-interfaces": [], "pmem": [], "balloon": None, "vsock": None, "entropy": None, "mmds-config": None,
        "memory-hotplug": None, "something-else": 1,
    })  # fmt: skip
    with launch_unjailed(tmp_path, ["--config-file", write(tmp_path, content)]) as vm:
        vm.wait_for_api()
        assert vm.must("GET", "/")["state"] == "Running"
        shown = vm.must("GET", "/vm/config")
        assert shown["machine-config"]["mem_size_mib"] == 64
        assert shown["boot-source"] == {**content["boot-source"], "initrd_path": None}
        vm.process.terminate()
        assert vm.wait() == -signal.SIGTERM
    assert "Successfully started microvm that was configured from one single json" in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "metrics").read_text().splitlines()[0])["properties"] == {"rack": "7"}


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (document(vsock={"guest_cid": 3, "uds_path": "v"}),
         ["Could not Start MicroVM from one single json", "The vsock device is not yet supported."]),
        ({"drives": []},
         ["Failed to build MicroVM from Json: Configuration for VMM from one single json failed: ",
          "missing field `boot-source`"]),
        (document(**{"boot-source": {"kernel_image_path": "/nix"}}),
         ["Failed to build MicroVM from Json: Configuration for VMM from one single json failed: Boot source error: ",
          "The kernel file cannot be opened: No such file or directory (os error 2)"]),
        (document(**{"machine-config": {"vcpu_count": 33, "mem_size_mib": 64}}),
         ["Failed to build MicroVM from Json", "The number of vCPUs must be greater than 0"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("api", [True, False])
def test_a_configuration_that_is_refused_ends_the_program(content, texts, api, tmp_path):
    flags = [] if api else ["--no-api"]
    with launch_unjailed(tmp_path, ["--config-file", write(tmp_path, content), *flags]) as vm:
        assert vm.wait() == 1
        output = vm.console.decode()
    assert all(text in output for text in texts), output
    assert "Firecracker exiting with error. exit_code=1" in output
    assert vm.api_socket.exists() == api


def test_the_boot_timer(tmp_path):
    content = document(**{"boot-source": {"kernel_image_path": str(build("boot_timer"))}})
    flags = ["--config-file", write(tmp_path, content), "--no-api", "--boot-timer"]
    with launch_unjailed(tmp_path, flags) as vm:
        line = vm.expect("Guest-boot-time")
        found = re.search(r"Guest-boot-time = +(\d+) us (\d+) ms, +(\d+) CPU us (\d+) CPU ms", line)
        assert found is not None
        us, ms, cpu_us, cpu_ms = map(int, found.groups())
        assert (us // 1000, cpu_us // 1000) == (ms, cpu_ms)
        assert cpu_us > 0
        vm.expect("timed")
        assert not vm.api_socket.exists()


def test_without_the_boot_timer_its_page_is_nobodys(tmp_path):
    content = document(**{"boot-source": {"kernel_image_path": str(build("boot_timer"))}})
    with launch_unjailed(tmp_path, ["--config-file", write(tmp_path, content), "--no-api"]) as vm:
        vm.expect("timed")
        assert b"Guest-boot-time" not in vm.console
