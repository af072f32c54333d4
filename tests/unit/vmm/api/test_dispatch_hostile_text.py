"""Whatever text stands where a body has text, or a path an id: an answer, and never a fault of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.api import Api
from vmm.api import dispatch

# Nothing here may be an absolute path to a place where a file could be made.
TEXTS = [
    "", ".", "..", "a\x00b", "\x00", "\x7f", "\u2028", "²", "٣", "٣,1", "0,²", "-1", "+1", " 1", "1_0", "é" * 200,
    "0" * 5000, "1" * 5000, "x" * 5000, "!", "!²", "!" + "0" * 5000, "0x", "0x" + "0" * 5000, "0b" + "x" * 5000,
    "1.2.3.٣", "00.0.0.0", "²²:11:11:11:11:11", "a:b:c:d:e:f", "ﬀ:ﬀ:ﬀ:ﬀ:ﬀ:ﬀ", "\U0010ffff", "a/../../b", "%2e%2e",
]  # fmt: skip
TEXT = "TEXT"
LEAF = {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": []}
REQUESTS: list[tuple[str, str, Any]] = [
    ("PATCH", "/machine-config", {"vcpu_placement": TEXT}),
    ("PATCH", "/machine-config", {"cpu_template": TEXT}),
    ("PUT", "/boot-source", {"kernel_image_path": TEXT}),
    ("PUT", "/boot-source", {"kernel_image_path": "KERNEL", "initrd_path": TEXT}),
    ("PUT", "/boot-source", {"kernel_image_path": "KERNEL", "boot_args": TEXT}),
    ("PUT", "/cpu-config", {"kvm_capabilities": [TEXT]}),
    ("PUT", "/cpu-config", {"msr_modifiers": [{"addr": TEXT, "bitmap": "0b1"}]}),
    ("PUT", "/cpu-config", {"msr_modifiers": [{"addr": "0x1", "bitmap": TEXT}]}),
    ("PUT", "/cpu-config", {"cpuid_modifiers": [{**LEAF, "subleaf": TEXT}]}),
    ("PUT", "/cpu-config", {"cpuid_modifiers": [{**LEAF, "modifiers": [{"register": TEXT, "bitmap": "0b1"}]}]}),
    ("PUT", "/serial", {"serial_out_path": TEXT}),
    ("PUT", "/logger", {"module": TEXT, "level": "Debug"}),
    ("PUT", "/logger", {"level": TEXT}),
    ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False, "path_on_host": TEXT, "partuuid": TEXT}),
    ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False, "socket": TEXT}),
    ("PUT", "/pmem/a", {"id": "a", "path_on_host": TEXT}),
    ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": TEXT}),
    ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t", "guest_mac": TEXT}),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": TEXT}),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": TEXT}),
    ("PUT", "/mmds/config", {"network_interfaces": [TEXT]}),
    ("PUT", "/mmds/config", {"network_interfaces": ["a"], "ipv4_address": TEXT}),
    ("PUT", "/mmds", {TEXT: TEXT}),
    ("PATCH", "/mmds", {TEXT: TEXT}),
    ("PUT", "/snapshot/load", {"snapshot_path": TEXT, "mem_file_path": TEXT}),
    ("PUT", "/actions", {"action_type": TEXT}),
    ("PUT", "/" + TEXT, {}),
    ("GET", "/" + TEXT, None),
    ("GET", "/balloon/" + TEXT, None),
    ("PUT", "/drives/" + TEXT, {"drive_id": TEXT, "is_root_device": False}),
    ("DELETE", "/pmem/" + TEXT, None),
    ("PATCH", "/vcpus/" + TEXT, {"action": "Replace"}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request[0]} {request[1]} {request[2]}"[:80])
def test_any_text_gets_an_answer(
    request_: tuple[str, str, Any], api: Api, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method, path, body = request_
    for text in TEXTS:
        quoted = json.dumps(text, ensure_ascii=False)[1:-1]
        data = None
        if body is not None:
            data = json.dumps(body).replace(TEXT, quoted).replace("KERNEL", kernel).encode()
        status, reply = api.send(method, path.replace(TEXT, text), data)
        assert status in (200, 204, 400), (text, reply)
        assert status != 400 or not reply["fault_message"].startswith("Internal VMM error: unexpected"), (text, reply)


def test_thousands_of_zeros_are_a_number(api: Api) -> None:
    """Python converts no decimal number of so many digits; this once ended the controller."""
    assert api.send("PUT", "/cpu-config", {"kvm_capabilities": ["0" * 5000 + "7"]}) == (204, None)
    (capability,) = api.session.resources.cpu_template.kvm_capabilities  # type: ignore[union-attr]
    assert (capability.number, capability.required) == (7, True)


def test_a_fault_while_a_request_is_parsed_is_answered(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_request: object) -> None:
        raise ValueError("not thought of")

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "parse", fail)
        text = "Internal VMM error: unexpected ValueError at test_dispatch_hostile_text.py:"
        assert api.fault("GET", "/").startswith(text)
    assert api.send("GET", "/")[0] == 200
