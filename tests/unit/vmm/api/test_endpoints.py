"""Every endpoint that is built: state × body → status and exact text."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from tests.harness.api import BuilderError, parse_response
from vmm.api.dispatch import path_tokens
from vmm.boot.cmdline import DEFAULT_COMMAND_LINE

PREBOOT = "The requested operation is not supported before starting the microVM."
POSTBOOT = "The requested operation is not supported after starting the microVM."
JSON = "An error occurred when deserializing the json body of a request: "
VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)
MEMORY = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
MACHINE = {
    "vcpu_count": 1,
    "mem_size_mib": 128,
    "smt": False,
    "track_dirty_pages": False,
    "huge_pages": "None",
}
MACHINE_FIELDS = "one of `vcpu_count`, `mem_size_mib`, `smt`, `cpu_template`, `track_dirty_pages`, `huge_pages`"
FIELDS_2 = "`kernel_image_path`, `initrd_path`, `boot_args`"

NO_KERNEL = "Start microvm error: Cannot start microvm without kernel configuration."
NO_INITRD = (
    "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "
    "No such file or directory (os error 2)"
)
#: (method, path, body) → status before the start, status while running.
STATES = [
    ("GET", "/", None, 200, 200),
    ("GET", "/version", None, 200, 200),
    ("GET", "/machine-config", None, 200, 200),
    ("GET", "/vm/config", None, 200, 200),
    ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 256}, 204, POSTBOOT),
    ("PATCH", "/machine-config", {"mem_size_mib": 256}, 204, POSTBOOT),
    ("PUT", "/boot-source", {"kernel_image_path": "KERNEL"}, 204, POSTBOOT),
    ("PUT", "/serial", {"serial_out_path": "console"}, 204, POSTBOOT),
    ("PUT", "/logger", {"level": "Debug"}, 204, POSTBOOT),
    ("PUT", "/actions", {"action_type": "InstanceStart"}, NO_KERNEL, POSTBOOT),
    ("PUT", "/actions", {"action_type": "FlushMetrics"}, PREBOOT, 204),
    ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, PREBOOT, 204),
    ("PATCH", "/vm", {"state": "Paused"}, PREBOOT, 204),
    ("PATCH", "/vm", {"state": "Resumed"}, PREBOOT, 204),
]  # fmt: skip


def _check(api, kernel, request, expected):
    method, path, body = request
    if body is not None and "kernel_image_path" in body:
        body = {"kernel_image_path": kernel}
    status, reply = api.send(method, path, body)
    if isinstance(expected, str):
        assert (status, reply) == (400, {"fault_message": expected})
    else:
        assert status == expected
        assert (reply is None) == (status == 204)


@pytest.mark.parametrize("case", STATES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_before_the_start(api, kernel, case):
    _check(api, kernel, case[:3], case[3])


@pytest.mark.parametrize("case", STATES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_while_running(running, kernel, case):
    _check(running, kernel, case[:3], case[4])


@pytest.mark.parametrize("case", STATES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_while_paused(running, kernel, case):
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    _check(running, kernel, case[:3], case[4])


BAD_BODIES = [
    ("PUT", "/machine-config", b"invalid_payload", JSON + "expected value at line 1 column 1."),
    ("PUT", "/machine-config", b'{"mem_size_mib": 128}', JSON + "missing field `vcpu_count` at line 1 column 21."),
    ("PUT", "/machine-config", b'{"vcpu_count": 2}', JSON + "missing field `mem_size_mib` at line 1 column 17."),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 1, "foo": 1}',
     JSON + f"unknown field `foo`, expected {MACHINE_FIELDS} at line 1 column 42."),
    ("PUT", "/machine-config", b'{"vcpu_count": "-2"}',
     JSON + 'invalid type: string "-2", expected u8 at line 1 column 19.'),
    ("PUT", "/machine-config", b'{"vcpu_count": 256}',
     JSON + "invalid value: integer `256`, expected u8 at line 1 column 18."),
    ("PUT", "/machine-config", b'{"vcpu_count": 0, "mem_size_mib": 128}', VCPUS),
    ("PUT", "/machine-config", b'{"vcpu_count": 33, "mem_size_mib": 128}', VCPUS),
    ("PUT", "/machine-config", b'{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}', VCPUS),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 0}', MEMORY),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "2M"}', MEMORY),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "Transparent"}', MEMORY),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 1, "huge_pages": "7M"}',
     JSON + "unknown variant `7M`, expected one of `None`, `Transparent`, `2M` at line 1 column 55."),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "X"}',
     JSON + "unknown variant `X`, expected one of `C3`, `T2`, `T2S`, `None`, `T2CL`, `T2A` at line 1 column 56."),
    ("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 18446744073709551616}',
     JSON + "invalid type: floating point `1.8446744073709552e+19`, expected usize at line 1 column 54."),
    ("PATCH", "/machine-config", b"{}", "Empty PATCH request."),
    ("PATCH", "/machine-config", b'{"smt": null}', "Empty PATCH request."),
    ("PATCH", "/machine-config", b'{"smt": 1}',
     JSON + "invalid type: integer `1`, expected a boolean at line 1 column 9."),
    ("PATCH", "/machine-config", b'{"mem_size_mib": 0}', MEMORY),
    ("PATCH", "/machine-config", b'{"vcpu_count": 33}', VCPUS),
    ("PUT", "/boot-source", b"{}", JSON + "missing field `kernel_image_path` at line 1 column 2."),
    ("PUT", "/boot-source", b'{"kernel_image_path": 1}',
     JSON + "invalid type: integer `1`, expected a string at line 1 column 23."),
    ("PUT", "/boot-source", b'{"kernel": "x"}',
     JSON + f"unknown field `kernel`, expected one of {FIELDS_2} at line 1 column 9."),
    ("PUT", "/boot-source", b'{"kernel_image_path": "foo.bar"}',
     "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"),
    ("PUT", "/boot-source", b'{"kernel_image_path": ""}',
     "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"),
    ("PUT", "/boot-source", b'{"kernel_image_path": "/"}',
     "Boot source error: The kernel file cannot be opened: Is a directory (os error 21)"),
    ("PUT", "/boot-source", b'{"kernel_image_path": "/dev/null"}',
     "Boot source error: The kernel file cannot be opened: not a regular file"),
    ("PUT", "/boot-source", b'{"kernel_image_path": "a\\u0000b"}',
     "Boot source error: The kernel file cannot be opened: file name contained an unexpected NUL byte"),
    ("PUT", "/boot-source", b'{"kernel_image_path": "KERNEL", "initrd_path": "foo"}',
     NO_INITRD),
    ("PUT", "/boot-source", b'{"kernel_image_path": "KERNEL", "boot_args": "a\\u0000b"}',
     "Boot source error: The kernel command line is invalid: Null terminator detected in the command line structure."),
    ("PUT", "/boot-source", b'{"kernel_image_path": "KERNEL", "boot_args": "%s"}' % (b"x" * 2048),
     "Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided."),
    ("PUT", "/actions", b"{}", JSON + "missing field `action_type` at line 1 column 2."),
    ("PUT", "/actions", b'{"action_type": "Foo"}',
     JSON + "unknown variant `Foo`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel` "
     "at line 1 column 21."),
    ("PUT", "/actions", b'{"action_type": "InstanceStart", "payload": 1}',
     JSON + "unknown field `payload`, expected `action_type` at line 1 column 42."),
    ("PATCH", "/vm", b'{"state": "Started"}',
     JSON + "unknown variant `Started`, expected `Paused` or `Resumed` at line 1 column 19."),
    ("PATCH", "/vm", b"{}", JSON + "missing field `state` at line 1 column 2."),
    ("PUT", "/serial", b'{"serial_out_path": 3}',
     JSON + "invalid type: integer `3`, expected path string at line 1 column 21."),
    ("PUT", "/serial", b'{"out": 3}',
     JSON + "unknown field `out`, expected `serial_out_path` or `rate_limiter` at line 1 column 6."),
    ("PUT", "/serial", b'{"rate_limiter": {"size": 1}}', JSON + "missing field `refill_time` at line 1 column 28."),
    ("PUT", "/serial", b'{"rate_limiter": {"size": -1, "refill_time": 1}}',
     JSON + "invalid value: integer `-1`, expected u64 at line 1 column 28."),
    ("PUT", "/logger", b'{"level": "loud"}', JSON + "Invalid LevelFilter at line 1 column 17."),
    ("PUT", "/logger", b'{"path": "x"}',
     JSON + "unknown field `path`, expected one of `log_path`, `level`, `show_level`, `show_log_origin`, `module` "
     "at line 1 column 7."),
    ("PUT", "/logger", b'{"log_path": "/nix/nix"}',
     "Logger error: Failed to open target file: No such file or directory (os error 2)"),
    ("PUT", "/logger", b'{"log_path": "/"}', "Logger error: Failed to open target file: Is a directory (os error 21)"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_BODIES, ids=lambda case: f"{case[0]} {case[1]} {case[2][:60]!r}")
def test_a_body_that_is_refused_changes_nothing(api, kernel, case):
    method, path, body, message = case
    before = api.send("GET", "/vm/config"), api.session.resources.serial
    assert api.fault(method, path, body.replace(b"KERNEL", kernel.encode())) == message
    assert (api.send("GET", "/vm/config"), api.session.resources.serial) == before
    assert f"Status code: 400 Bad Request. Message: {message}\n" in api.log()


@pytest.mark.parametrize("case", BAD_BODIES, ids=lambda case: f"{case[0]} {case[1]} {case[2][:60]!r}")
def test_the_body_is_looked_at_before_the_state(running, kernel, case):
    method, path, body, message = case
    expected = message if message.startswith((JSON, "Empty")) else POSTBOOT
    assert running.fault(method, path, body.replace(b"KERNEL", kernel.encode())) == expected


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("GET", "/foo", None, "Invalid request method and/or path: GET foo."),
        ("GET", "/vm", None, "Invalid request method and/or path: GET vm."),
        ("GET", "/hotplug/disk", None, "Invalid request method and/or path: GET hotplug."),
        ("GET", "/boot-source", None, "Invalid request method and/or path: GET boot-source."),
        ("PATCH", "/boot-source", b"{}", "Invalid request method and/or path: PATCH boot-source."),
        ("PUT", "/foo/bar", b"{}", "Invalid request method and/or path: PUT foo."),
        ("PUT", "/", b"{}", "Invalid request method and/or path: PUT ."),
        ("DELETE", "/machine-config", None, "Invalid request method and/or path: DELETE machine-config."),
        ("GET", "/machine-config", b"{}", "GET request cannot have a body."),
        ("GET", "/foo", b"{}", "GET request cannot have a body."),
        ("PUT", "/machine-config", None, "Empty PUT request."),
        ("PUT", "/foo", None, "Empty PUT request."),
        ("PATCH", "/vm", None, "Empty PATCH request."),
        ("DELETE", "/drives/a", b"{}", "Empty Delete request."),
    ],
)
def test_paths_and_body_rules(api, method, path, body, message):
    assert api.fault(method, path, body) == message


def test_surplus_slashes_and_tokens_do_not_matter(api):
    assert api.send("GET", "//version/")[0] == 200
    assert api.send("GET", "/version/foo")[0] == 200
    assert api.send("GET", "nonsense")[0] == 200  # a URI without a path asks for the instance information
    assert path_tokens("///a/b//") == ["a", "b", ""]
    assert path_tokens("/") == []


def test_information(api, running):
    assert running.send("GET", "/")[1] == {
        "id": "test", "state": "Running", "vmm_version": "1.17.0-dev", "app_name": "Firecracker",
    }  # fmt: skip
    running.send("PATCH", "/vm", {"state": "Paused"})
    assert running.send("GET", "/")[1]["state"] == "Paused"
    assert running.send("GET", "/version") == (200, {"firecracker_version": "1.17.0-dev"})


def test_information_before_the_start(api):
    assert list(api.send("GET", "/")[1].items()) == [
        ("id", "test"), ("state", "Not started"), ("vmm_version", "1.17.0-dev"), ("app_name", "Firecracker"),
    ]  # fmt: skip


def test_machine_config(api):
    assert list(api.send("GET", "/machine-config")[1].items()) == list(MACHINE.items())
    body = {"vcpu_count": 4, "mem_size_mib": 256, "smt": True, "cpu_template": "T2", "track_dirty_pages": True}
    assert api.send("PUT", "/machine-config", body) == (204, None)
    shown = {"vcpu_count": 4, "mem_size_mib": 256, "smt": True, "cpu_template": "T2", "track_dirty_pages": True,
             "huge_pages": "None"}  # fmt: skip
    assert list(api.send("GET", "/machine-config")[1].items()) == list(shown.items())
    # PUT resets what is not given, but for the CPU template; PATCH changes only what is given.
    assert api.send("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 128})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**MACHINE, "vcpu_count": 2, "cpu_template": "T2"}
    assert api.send("PATCH", "/machine-config", {"cpu_template": "None", "smt": None})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**MACHINE, "vcpu_count": 2}
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": (1 << 64) - 1})[0] == 204


def test_limits_are_inclusive(api, kernel):
    for body in (
        {"vcpu_count": 32, "mem_size_mib": 1, "smt": True},
        {"vcpu_count": 31, "mem_size_mib": 1},
        {"vcpu_count": 1, "mem_size_mib": 1, "smt": True},
        {"vcpu_count": 1, "mem_size_mib": 2, "huge_pages": "2M"},
        {"vcpu_count": 1, "mem_size_mib": (1 << 64) - 1},
    ):
        assert api.send("PUT", "/machine-config", body) == (204, None)
    longest = {"kernel_image_path": kernel, "boot_args": "x" * 2047}
    assert api.send("PUT", "/boot-source", longest) == (204, None)
    assert api.send("PUT", "/boot-source", {**longest, "boot_args": ""}) == (204, None)


def test_deprecation_header_also_on_errors(api, running):
    body = b'{"vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "None"}'
    status, _, headers = parse_response(running.raw("PUT", "/machine-config", body))
    assert (status, headers["Deprecation"]) == (400, "true")
    assert "PUT /machine-config: cpu_template field is deprecated." in running.log()
    status, _, headers = parse_response(running.raw("PATCH", "/machine-config", b'{"smt": true}'))
    assert status == 400
    assert "Deprecation" not in headers


def test_deprecation_header_on_success(api):
    status, _, headers = parse_response(api.raw("PATCH", "/machine-config", b'{"cpu_template": "C3"}'))
    assert (status, headers["Deprecation"]) == (204, "true")
    assert "PATCH /machine-config: cpu_template field is deprecated." in api.log()


def test_full_config(api, kernel):
    sections: dict[str, Any] = {
        "balloon": None,
        "drives": [],
        "boot-source": {"kernel_image_path": "", "initrd_path": None, "boot_args": None},
        "cpu-config": None,
        "logger": None,
        "machine-config": MACHINE,
        "metrics": None,
        "mmds-config": None,
        "network-interfaces": [],
        "vsock": None,
        "entropy": None,
        "pmem": [],
        "memory-hotplug": None,
    }
    assert api.send("GET", "/vm/config") == (200, sections)
    boot_source = {"kernel_image_path": kernel, "initrd_path": kernel, "boot_args": "a b"}
    assert api.send("PUT", "/boot-source", boot_source)[0] == 204
    assert api.send("PUT", "/serial", {"serial_out_path": "x"})[0] == 204
    status, reply = api.send("GET", "/vm/config")
    assert (status, reply) == (200, {**sections, "boot-source": boot_source})
    assert list(reply) == list(sections)
    assert api.send("PUT", "/actions", {"action_type": "InstanceStart"})[0] == 204
    assert api.send("GET", "/vm/config") == (200, {**sections, "boot-source": boot_source})


def test_boot_source_files_are_opened_at_once_and_closed_when_replaced(api, kernel):
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": kernel, "boot_args": "quiet"})
    first = api.session.resources.require_boot_source()
    os.unlink(kernel)
    assert os.pread(first.kernel_fd, 10, 0) == b"kernel"
    assert os.pread(first.initrd_fd, 10, 0) == b"kernel"
    assert not os.get_inheritable(first.kernel_fd)
    assert first.command_line == "quiet"
    # The file is gone: the new boot source is refused, and the old one stays.
    api.fault("PUT", "/boot-source", {"kernel_image_path": kernel})
    assert api.session.resources.require_boot_source() is first
    other = kernel + "2"
    with open(other, "wb"):
        pass
    descriptors = len(os.listdir("/proc/self/fd"))
    assert api.send("PUT", "/boot-source", {"kernel_image_path": other})[0] == 204
    assert first.kernel_fd == -1
    second = api.session.resources.require_boot_source()
    assert second.command_line == DEFAULT_COMMAND_LINE
    assert second.initrd_fd == -1
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1  # two closed, one opened


def test_a_refused_boot_source_leaks_no_descriptor(api, kernel):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        api.fault("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": kernel, "boot_args": "\0"})
        api.fault("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": "nix"})
        api.fault("PUT", "/boot-source", {"kernel_image_path": "/dev/null"})
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fifo_as_kernel_does_not_block(api, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    message = api.fault("PUT", "/boot-source", {"kernel_image_path": fifo})
    assert message == "Boot source error: The kernel file cannot be opened: not a regular file"


def test_serial(api):
    bucket = {"size": 10, "refill_time": 100, "one_time_burst": None, "anything": 1}
    assert api.send("PUT", "/serial", {"serial_out_path": "x", "rate_limiter": bucket})[0] == 204
    serial = api.session.resources.serial
    assert serial.serial_out_path == "x"
    assert serial.rate_limiter is not None
    assert serial.rate_limiter._asdict() == {"size": 10, "one_time_burst": None, "refill_time": 100}
    assert api.send("PUT", "/serial", {"serial_out_path": None})[0] == 204
    assert api.session.resources.serial.serial_out_path is None
    assert api.session.resources.open_serial_output() == -1


# -- start and operation ----------------------------------------------------------------------------------------------


def test_a_failed_start_leaves_everything_configurable(api, kernel):
    assert api.send("PUT", "/boot-source", {"kernel_image_path": kernel})[0] == 204
    api.start_error = BuilderError(
        "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error 12)"
    )
    start = {"action_type": "InstanceStart"}
    assert api.fault("PUT", "/actions", start) == f"Start microvm error: {api.start_error}"
    assert api.send("GET", "/")[1]["state"] == "Not started"
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": 64})[0] == 204
    api.start_error = None
    assert api.send("PUT", "/actions", start) == (204, None)
    assert api.session.vmm is api.vmm
    assert len(api.built) == 2
    assert api.built[-1].machine_config.mem_size_mib == 64
    # What was held open for the start is closed, what was configured is still shown.
    assert api.built[-1].require_boot_source().kernel_fd == -1
    assert api.fault("PUT", "/actions", start) == POSTBOOT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"huge_pages": "2M"}, "Huge pages are not yet supported: huge_pages is 2M."),
    ],
)
def test_what_cannot_be_started_yet_is_refused_at_the_start(api, kernel, change, message):
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
    assert api.send("PATCH", "/machine-config", change)[0] == 204
    assert api.fault("PUT", "/actions", {"action_type": "InstanceStart"}) == f"Start microvm error: {message}"
    assert not api.built


def test_operations(running):
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    assert running.send("PATCH", "/vm", {"state": "Resumed"}) == (204, None)
    assert running.send("PUT", "/actions", {"action_type": "SendCtrlAltDel"}) == (204, None)
    assert running.vmm.calls == ["pause", "pause", "resume", "ctrl-alt-del"]
    log = running.log()
    for text in ("'pause vm' VMM action took ", "'pause vm' API request took ", "'resume vm' API request took "):
        assert text in log


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/vm", {"state": "Paused"}),
        ("PATCH", "/vm", {"state": "Resumed"}),
        ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
    ],
)
def test_an_operation_that_fails_says_why(running, method, path, body):
    running.vmm.fail = BuilderError("the worker did not answer")
    assert running.fault(method, path, body) == "Internal VMM error: the worker did not answer"
    assert running.send(method, path, body) == (204, None)


def test_a_fault_of_ours_is_answered_without_a_traceback(running):
    running.vmm.fail = AssertionError("impossible\nstate")
    message = running.fault("PATCH", "/vm", {"state": "Paused"})
    assert message.startswith("Internal VMM error: unexpected AssertionError at api.py:")
    assert "impossible\\nstate" in running.log()
    assert "Traceback" not in running.log()
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)


# -- log --------------------------------------------------------------------------------------------------------------


def test_requests_are_logged(api):
    api.send("GET", "/machine-config")
    api.send("PATCH", "/machine-config", {"mem_size_mib": 64})
    api.raw("PUT", "/mmds", b'{"secret": 1}')
    api.raw("PUT", "/boot-source", b'\xff"')
    log = api.log()
    assert '[test:fc_api:INFO] The API server received a Get request on "/machine-config".\n' in log
    assert 'The API server received a Patch request on "/machine-config" with body "{\\"mem_size_mib\\": 64}".\n' in log
    assert 'The API server received a Put request on "/mmds".\n' in log
    assert "secret" not in log
    assert '"/boot-source" with body "inconvertible to UTF-8".\n' in log
    assert "The request was executed successfully. Status code: 200 OK.\n" in log
    assert "The request was executed successfully. Status code: 204 No Content.\n" in log
    assert "[test:fc_api:DEBUG] Total previous API call duration: " in log


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/", None),
        ("PUT", "/boot-source", {"kernel_image_path": "nix"}),  # fails
        ("PATCH", "/vm", {"state": "Paused"}),  # refused by the state
        ("PATCH", "/vm", {}),  # refused by the shape
        ("GET", "/nonsense", None),
        ("PUT", "/mmds", {"a": "x" * 60000}),  # too large
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": "a"}),  # deprecated
        ("GET", "/metrics/prometheus", None),
        ("GET", "/events", None),  # there are none here
    ],
)
def test_the_duration_of_each_call_is_the_last_line_about_it(api, method, path, body):
    for number in (1, 2):
        api.raw(method, path, None if body is None else json.dumps(body).encode())
        lines = api.log().splitlines()
        assert re.search(r"\[test:fc_api:DEBUG\] Total previous API call duration: \d+ us\.$", lines[-1]), lines
        assert api.log().count("Total previous API call duration") == number


def test_no_duration_is_logged_above_debug(api):
    api.send("PUT", "/logger", {"level": "Info"})
    before = api.log().count("Total")
    api.send("GET", "/")
    assert api.log().count("Total") == before == 0


def test_a_fault_of_ours_has_a_duration_too(running):
    running.vmm.fail = ZeroDivisionError("bug")
    running.fault("PATCH", "/vm", {"state": "Paused"})
    assert "Total previous API call duration" in running.log().splitlines()[-1]


def test_the_body_of_a_cpu_configuration_is_logged_at_debug_only(api):
    api.raw("PUT", "/cpu-config", b'{"a": 1}')
    assert 'on "/cpu-config" with body "{\\"a\\": 1}".' in api.log()
    api.send("PUT", "/logger", {"level": "Info"})
    api.raw("PUT", "/cpu-config", b'{"b": 1}')
    assert "To view the CPU template received by the API, configure log-level to DEBUG." in api.log()
    assert '"b' not in api.log()


def test_put_logger_may_be_repeated(api, tmp_path):
    for number in range(3):
        body = {"log_path": str(tmp_path / f"log{number}"), "level": "warning", "show_level": True}
        assert api.send("PUT", "/logger", body)[0] == 204
        api.fault("GET", "/foo")
        lines = (tmp_path / f"log{number}").read_text().splitlines()
        assert len(lines) == 1  # the lines at level Info are gone
        assert ":ERROR] Received Error." in lines[0]


def test_bodies_are_compact_json(api):
    assert api.raw("GET", "/version").endswith(b'\r\n\r\n{"firecracker_version":"1.17.0-dev"}')
    body = api.raw("PUT", "/foo", b"{}").partition(b"\r\n\r\n")[2]
    assert body == b'{"fault_message":"Invalid request method and/or path: PUT foo."}'
    assert json.loads(api.raw("GET", '/"\n', None).partition(b"\r\n\r\n")[2])


def test_vcpus_cannot_be_shown_before_the_start(api):
    assert api.fault("GET", "/vcpus") == PREBOOT


def test_vcpus_are_shown_once_the_microvm_runs(running):
    assert running.send("GET", "/vcpus") == (200, [{"index": 0, "state": "running"}])
    assert running.fault("GET", "/vcpus/0") == "Invalid request method and/or path: GET vcpus."


REPLACE = {"action": "Replace"}


def test_workers_are_replaced_one_or_all(running):
    assert running.send("PATCH", "/vcpus/3", REPLACE) == (204, None)
    assert running.send("PATCH", "/vcpus/", REPLACE) == (204, None)
    assert running.vmm.calls[-2:] == ["replace 3", "replace all"]
    assert running.fault("PATCH", "/vcpus/-1", REPLACE) == "Invalid vCPU index: '-1'."
    assert running.fault("PATCH", "/vcpus/12345", REPLACE) == "Invalid vCPU index: '12345'."
    assert running.fault("PATCH", "/vcpus/1/2", REPLACE) == "Invalid vCPU index: '1'."
    assert "unknown variant" in running.fault("PATCH", "/vcpus/1", {"action": "Kill"})
    assert running.vmm.calls[-1] == "replace all"


def test_no_worker_is_replaced_before_the_start(api):
    assert api.fault("PATCH", "/vcpus/0", REPLACE) == PREBOOT


@pytest.mark.parametrize("placement", ["Automatic", "Split", "Grouped", "0,1/2,3", "3/2,1,0"])
def test_a_vcpu_placement_is_shown_only_if_it_was_set(api, placement):
    shown = api.send("GET", "/machine-config")[1]
    assert "vcpu_placement" not in shown
    assert (
        api.send("PUT", "/machine-config", {"vcpu_count": 4, "mem_size_mib": 128, "vcpu_placement": placement})[0]
        == 204
    )
    assert api.send("GET", "/machine-config")[1] == {**shown, "vcpu_count": 4, "vcpu_placement": placement}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vcpu_placement": "0,1"}, "The vCPU placement must name each vCPU from 0 to 3 exactly once."),
        ({"vcpu_placement": "split"}, None),
        ({"vcpu_placement": "0/1/2/3/4"}, "The vCPU placement must name each vCPU from 0 to 3 exactly once."),
        ({"vcpu_count": 2}, "The vCPU placement must name each vCPU from 0 to 1 exactly once."),
    ],
)
def test_an_impossible_placement_changes_nothing(api, change, message):
    body = {"vcpu_count": 4, "mem_size_mib": 128, "vcpu_placement": "0,1/2,3"}
    assert api.send("PUT", "/machine-config", body)[0] == 204
    message = message or "The vCPU placement is Automatic, Split, Grouped, or groups of vCPU numbers such as 0,1/2,3."
    assert api.fault("PATCH", "/machine-config", change) == f"Machine config error: {message}"
    assert api.send("GET", "/machine-config")[1]["vcpu_placement"] == "0,1/2,3"


@pytest.mark.parametrize("action", ["Exit", "Restart"])
def test_a_reboot_action_is_shown_only_if_it_was_set(api, action):
    shown = api.send("GET", "/machine-config")[1]
    assert "reboot_action" not in shown
    assert api.send("PATCH", "/machine-config", {"reboot_action": action})[0] == 204
    assert api.send("GET", "/machine-config")[1] == {**shown, "reboot_action": action}
    assert api.send("PATCH", "/machine-config", {"reboot_action": "Halt"})[0] == 400
    assert api.send("GET", "/machine-config")[1] == {**shown, "reboot_action": action}
