"""The microVM as a whole: information, start, pause, what operates it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.api import BuilderError

PREBOOT = "The requested operation is not supported before starting the microVM."
POSTBOOT = "The requested operation is not supported after starting the microVM."
MACHINE = {
    "vcpu_count": 1,
    "mem_size_mib": 128,
    "smt": False,
    "track_dirty_pages": False,
    "huge_pages": "None",
}
NO_KERNEL = "Start microvm error: Cannot start microvm without kernel configuration."
NET = {"iface_id": "eth0", "host_dev_name": "tap0"}


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


def test_a_start_needs_a_kernel(api):
    assert api.fault("PUT", "/actions", {"action_type": "InstanceStart"}) == NO_KERNEL


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


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/drives/data", {"drive_id": "data", "is_root_device": False, "socket": "s"}, "The block device data"),
        ("/pmem/p0", {"id": "p0", "path_on_host": "x"}, "The pmem device p0"),
        ("/network-interfaces/eth0", NET, "The network interface eth0"),
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}, "The vsock device"),
        ("/balloon", {"amount_mib": 1, "deflate_on_oom": True}, "The balloon device"),
        ("/hotplug/memory", {"total_size_mib": 128}, "The memory hot-plug device"),
    ],
)
def test_devices_to_come_are_refused_by_name_at_the_start(api, kernel, path, body, name):
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
    assert api.send("PUT", path, body) == (204, None)
    start = {"action_type": "InstanceStart"}
    assert api.fault("PUT", "/actions", start) == f"Start microvm error: {name} is not yet supported."
    assert not api.built


@pytest.mark.parametrize("state", ["Paused", "Resumed"])
def test_the_state_can_be_changed_after_the_start(api, kernel, state):
    assert api.fault("PATCH", "/vm", {"state": state}) == PREBOOT
    assert api.send("PUT", "/boot-source", {"kernel_image_path": kernel}) == (204, None)
    assert api.send("PUT", "/actions", {"action_type": "InstanceStart"}) == (204, None)
    for _ in range(2):
        assert api.send("PATCH", "/vm", {"state": state}) == (204, None)
        assert api.send("GET", "/")[1]["state"] == state.replace("Resumed", "Running")


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
