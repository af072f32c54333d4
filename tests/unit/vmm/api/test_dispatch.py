"""What is the same for all requests: paths, order of the checks, deprecation, log, faults of ours."""

from __future__ import annotations

import json
import re

import pytest

from tests.harness.api import BuilderError, parse_response
from vmm.api.dispatch import endpoints, path_tokens
from vmm.api.endpoints import instance
from vmm.config import file as config_file
from vmm.observe.metrics import Metrics

DRIVE = {"drive_id": "a", "is_root_device": False, "path_on_host": "KERNEL"}
NET = {"iface_id": "eth0", "host_dev_name": "tap0"}
LOAD = {"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "File"}}


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


def test_bodies_are_compact_json(api):
    assert api.raw("GET", "/version").endswith(b'\r\n\r\n{"firecracker_version":"1.17.0-dev"}')
    body = api.raw("PUT", "/foo", b"{}").partition(b"\r\n\r\n")[2]
    assert body == b'{"fault_message":"Invalid request method and/or path: PUT foo."}'
    assert json.loads(api.raw("GET", '/"\n', None).partition(b"\r\n\r\n")[2])


def test_a_fault_of_ours_is_answered_without_a_traceback(running):
    running.vmm.fail = AssertionError("impossible\nstate")
    message = running.fault("PATCH", "/vm", {"state": "Paused"})
    assert message.startswith("Internal VMM error: unexpected AssertionError at api.py:")
    assert "impossible\\nstate" in running.log()
    assert "Traceback" not in running.log()
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)


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


@pytest.mark.parametrize(
    ("method", "path", "body", "text"),
    [
        ("PATCH", "/machine-config", {"cpu_template": "None"},
         "PATCH /machine-config: cpu_template field is deprecated."),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": "a"},
         "PUT /vsock: vsock_id field is deprecated."),
        ("PUT", "/mmds/config", {"network_interfaces": []}, "PUT /mmds/config: V1 is deprecated. Use V2 instead."),
        ("PUT", "/mmds/config", {"network_interfaces": [], "version": "V1"},
         "PUT /mmds/config: V1 is deprecated. Use V2 instead."),
        ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m"},
         "PUT /snapshot/load: mem_file_path field is deprecated."),
        ("PUT", "/snapshot/load", {**LOAD, "enable_diff_snapshots": True},
         "PUT /snapshot/load: enable_diff_snapshots field is deprecated."),
        ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m", "enable_diff_snapshots": True},
         "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated."),
    ],
)  # fmt: skip
def test_deprecated_requests_are_marked_logged_and_counted(api, method, path, body, text):
    assert api.deprecated(method, path, body)  # also where the answer is an error
    assert f":WARN] {text}\n" in api.log()
    assert api.metrics["deprecated_api"].values == {"deprecated_http_api_calls": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": None}),
        ("/mmds/config", {"network_interfaces": [], "version": "V2"}),
        ("/snapshot/load", {**LOAD, "enable_diff_snapshots": False}),
    ],
)
def test_other_requests_are_not(api, path, body):
    assert not api.deprecated("PUT", path, body)
    assert api.metrics["deprecated_api"].values == {"deprecated_http_api_calls": 0}


def test_null_is_as_good_as_absent(api, kernel):
    for path, body in (
        ("/drives/a", {**DRIVE, "path_on_host": kernel, "partuuid": None, "rate_limiter": None, "socket": None}),
        ("/network-interfaces/eth0", {**NET, "guest_mac": None, "mtu": None, "rx_rate_limiter": {"ops": None}}),
        ("/entropy", {"rate_limiter": None}),
    ):
        assert api.send("PUT", path, body) == (204, None)
    assert api.config()["network-interfaces"][0]["rx_rate_limiter"] is None


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


# -- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", endpoints(), ids=lambda row: f"{row.method} {row.path} {row.choice}")
def test_a_row_counts_where_there_is_a_counter(row):
    if not row.counted:
        return
    group = Metrics()[f"{row.method.lower()}_api_requests"].values
    assert f"{row.counted}_count" in group
    assert row.method == "GET" or f"{row.counted}_fails" in group


def test_all_rows_of_a_path_count_the_same():
    """What is counted is known before the row is: also a request that is refused counts."""
    counted: dict[tuple[str, str], set[str]] = {}
    for row in endpoints():
        counted.setdefault((row.method, row.path.partition("/")[0]), set()).add(row.counted)
    assert all(len(names) == 1 for names in counted.values()), counted


def test_every_section_of_the_configuration_file_has_one_row():
    sections = [row.section for row in endpoints() if row.section]
    assert sorted(sections) == sorted(config_file.ORDER) == sorted(field.key for field in config_file._FIELDS)
    assert all(row.before is not None and row.prefix for row in endpoints() if row.section)


@pytest.mark.parametrize(
    ("method", "path", "shape"), [("PUT", "actions", instance.ACTION), ("PATCH", "vm", instance.VM_STATE)]
)
def test_every_choice_of_a_body_has_one_row(method, path, shape):
    choices = [row.choice for row in endpoints() if (row.method, row.path) == (method, path)]
    assert sorted(choices) == sorted(shape.fields[0].type.names)


def test_no_other_row_is_a_choice():
    assert {(row.method, row.path) for row in endpoints() if row.choice} == {("PUT", "actions"), ("PATCH", "vm")}


def test_an_error_without_a_prefix_is_a_fault_of_ours(api, monkeypatch):
    def fail(_config):
        raise BuilderError("no prefix")

    monkeypatch.setattr(api.session.resources, "set_serial", fail)
    assert api.fault("PUT", "/serial", {}).startswith(
        "Internal VMM error: unexpected BuilderError at test_dispatch.py:"
    )
