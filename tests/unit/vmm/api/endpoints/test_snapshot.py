"""Snapshots: when they can be created and loaded."""

from __future__ import annotations

import json

import pytest

DRIVE = {"drive_id": "a", "is_root_device": False, "path_on_host": "KERNEL"}
PMEM = {"id": "a", "path_on_host": "nix"}
NET = {"iface_id": "eth0", "host_dev_name": "tap0"}
SNAPSHOT = {"snapshot_path": "s", "mem_file_path": "m"}
LOAD = {"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "File"}}
NOT_YET = "Snapshots are not yet supported."


@pytest.mark.parametrize(
    ("path", "body", "allowed"),
    [
        ("/boot-source", {"kernel_image_path": "KERNEL"}, False),
        ("/drives/a", DRIVE, False),
        ("/pmem/a", PMEM, False),
        ("/network-interfaces/eth0", NET, False),
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}, False),
        ("/entropy", {}, False),
        ("/balloon", {"amount_mib": 1, "deflate_on_oom": True}, False),
        ("/hotplug/memory", {"total_size_mib": 128}, False),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}, False),
        ("/logger", {"level": "Debug"}, True),
        ("/serial", {}, True),
        ("/mmds", {}, True),
        ("/cpu-config", {}, True),
        ("/drives/a", {**DRIVE, "path_on_host": "nix"}, True),  # refused: it has changed nothing
    ],
)
def test_a_snapshot_is_loaded_before_anything_boot_specific(api, kernel, path, body, allowed):
    api.send("PUT", path, json.dumps(body).replace("KERNEL", kernel).encode())
    refused = "Loading a microVM snapshot not allowed after configuring boot-specific resources."
    assert api.fault("PUT", "/snapshot/load", LOAD) == f"Load snapshot error: {NOT_YET if allowed else refused}"


@pytest.mark.parametrize(("state", "text"), [
    ("Resumed", "Operation not allowed: save/restore unavailable while running"), ("Paused", NOT_YET),
])  # fmt: skip
def test_a_snapshot_is_created_only_while_paused(running, state, text):
    running.send("PATCH", "/vm", {"state": state})
    assert running.fault("PUT", "/snapshot/create", SNAPSHOT) == f"Create snapshot error: {text}"
