"""The vCPUs: what is shown of them, and the replacement of their workers."""

from __future__ import annotations

PREBOOT = "The requested operation is not supported before starting the microVM."

REPLACE = {"action": "Replace"}


def test_vcpus_cannot_be_shown_before_the_start(api):
    assert api.fault("GET", "/vcpus") == PREBOOT


def test_vcpus_are_shown_once_the_microvm_runs(running):
    assert running.send("GET", "/vcpus") == (200, [{"index": 0, "state": "running"}])
    assert running.fault("GET", "/vcpus/0") == "Invalid request method and/or path: GET vcpus."


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
