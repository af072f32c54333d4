"""Every method of ``Vmm`` on a guest that was booted, by way of its API call where it has one.

The controller's parts run in this process, on a real worker with a real KVM VM; only the supervisor is a stand-in.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from base.event_manager import Events
from devtool.project import ROOT
from tests.api_table import ROWS, STATE_CHANGES, VALID
from tests.harness.cells import open_descriptors
from tests.harness.vmm_in_process import Machine
from vcpu_worker import state as vcpu_state
from vmm.errors import DeviceError, StateError
from vmm.machine.vmm import Vmm
from vmm.snapshot import microvm_state

BUCKET = {"size": 1, "refill_time": 1}
PAUSE, RESUME = {"state": "Paused"}, {"state": "Resumed"}
#: Method and its API call, which answers a running guest's client what the table of the API says.
CALLS: list[tuple[str, str, str, Any]] = [
    ("version", "GET", "/version", None),
    ("pause_vm", "PATCH", "/vm", PAUSE),
    ("pause_vm", "PATCH", "/vm", PAUSE),
    ("resume_vm", "PATCH", "/vm", RESUME),
    ("resume_vm", "PATCH", "/vm", RESUME),
    ("send_ctrl_alt_del", "PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
    ("update_block_device_path", "PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "x"}),
    ("update_block_rate_limiter", "PATCH", "/drives/a", {"drive_id": "a", "rate_limiter": {"ops": BUCKET}}),
    ("update_vhost_user_block_config", "PATCH", "/drives/a", {"drive_id": "a"}),
    ("update_net_rate_limiters", "PATCH", "/network-interfaces/e0", {"iface_id": "e0"}),
    ("update_pmem_rate_limiter", "PATCH", "/pmem/a", {"id": "a", "rate_limiter": {"ops": BUCKET}}),
    ("balloon_config", "GET", "/balloon", None),
    ("latest_balloon_stats", "GET", "/balloon/statistics", None),
    ("update_balloon_config", "PATCH", "/balloon", {"amount_mib": 1}),
    ("update_balloon_stats_config", "PATCH", "/balloon/statistics", {"stats_polling_interval_s": 1}),
    ("memory_hotplug_status", "GET", "/hotplug/memory", None),
    ("update_memory_hotplug_size", "PATCH", "/hotplug/memory", {"requested_size_mib": 2}),
    ("start_balloon_hinting", "PATCH", "/balloon/hinting/start", None),
    ("get_balloon_hinting_status", "GET", "/balloon/hinting/status", None),
    ("stop_balloon_hinting", "PATCH", "/balloon/hinting/stop", None),
]
#: Those that the test calls itself: no request reaches them (yet), or only at the start.
DIRECT = (
    "instance_info", "kvm", "shutdown_exit_code", "clear_shutdown_exit_code", "start_vcpus", "save_state",
    "dump_cpu_config", "stop", "process", "init", "close",
)  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path, log: Any) -> Iterator[Machine]:
    directory = tmp_path / "ipc"
    directory.mkdir()
    made = Machine(directory)
    yield made
    made.close()


def answers(method: str, path: str) -> list[Any]:
    """Return what the table of the API has for a good request while the guest runs: a text, or a success's body."""
    bodies = {200: {"firecracker_version": "1.17.0-dev"}, 204: None}
    rows = [row for row in (*ROWS, *STATE_CHANGES) if (row.method, row.path, row.kind) == (method, path, VALID)]
    return [row.running if isinstance(row.running, str) else bodies[row.running] for row in rows if row.running != -1]


def test_each_operation_is_reached_by_its_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def record(name: str) -> None:
        original = getattr(Vmm, name)

        def method(self: Vmm, *arguments: Any, **named: Any) -> Any:
            called.append(name)
            return original(self, *arguments, **named)

        monkeypatch.setattr(Vmm, name, method)

    for name in {each[0] for each in CALLS} | {"start_vcpus"}:
        record(name)
    machine.start()
    assert called == ["start_vcpus", "resume_vm"]
    for name, method, path, body in CALLS:
        called.clear()
        assert machine.send(method, path, body) in answers(method, path), (method, path)
        assert called == [name], (method, path)
    assert machine.vmm.instance_info() == ("standin", "Running", "1.17.0-dev", "Firecracker")
    assert machine.send("GET", "/") == machine.vmm.instance_info()._asdict()


def test_what_no_request_reaches(machine: Machine, log: Any) -> None:
    machine.start()
    vmm = machine.vmm
    kvm = vmm.kvm()
    assert kvm.api_version == 12
    assert kvm.vcpu_mmap_size >= 4096
    assert kvm.max_vcpus >= 1
    assert kvm.max_memslots >= 32
    assert (vmm.vm.vcpu_count, vmm.vm.mem_size_mib) == (1, 64)
    assert repr(vmm) == "<Vmm standin running [vcpu 0: running]>"
    assert [worker.index for worker in vmm.vcpus_handles] == [0]
    assert vmm.device_manager.serial is not None
    for operation in (vmm.save_state, vmm.dump_cpu_config):
        with pytest.raises(StateError, match="save/restore unavailable while running"):
            operation()
    vmm.send_ctrl_alt_del()
    vmm.pause_vm()
    saved = vmm.save_state()
    assert microvm_state.decode(microvm_state.encode(saved)) == saved
    assert saved.devices["i8042", ""].buffer == b"\x14\x11\xe0\x71"
    (vcpu,) = saved.vcpus
    first = vcpu_state.decode(vcpu.state)
    again = vcpu_state.decode(vmm.save_state().vcpus[0].state)
    # Saving changes nothing; only time goes on.
    for field in ("mp_state", "regs", "sregs", "events", "xsave", "lapic", "cpuid"):
        assert getattr(first, field) == getattr(again, field), field
    assert first.clock != bytes(len(first.clock))
    (config,) = vmm.dump_cpu_config()
    assert config.vcpu == 0
    assert len(config.cpuid) > 10
    assert len(config.msrs) > 1
    vmm.resume_vm()
    # Four times four codes fill the keyboard's buffer, and this guest reads none.
    for _ in range(3):
        vmm.send_ctrl_alt_del()
    with pytest.raises(DeviceError, match="I8042 error: i8042 internal buffer full"):
        vmm.send_ctrl_alt_del()
    vmm.process(Events(7, 0, 1), None)  # type: ignore[arg-type]
    assert "Spurious event 0x1 of descriptor 7" in log()


def test_stop_and_the_exit_code(machine: Machine, log: Any) -> None:
    machine.start()
    vmm = machine.vmm
    assert vmm.shutdown_exit_code() is None
    vmm.stop(0)
    assert vmm.shutdown_exit_code() == 0
    vmm.stop(1)
    assert vmm.shutdown_exit_code() == 1
    vmm.stop(0)
    assert vmm.shutdown_exit_code() == 1
    assert log().count("Vmm is stopping.") == 1
    assert machine.send("PATCH", "/vm", PAUSE) == "Internal VMM error: The microVM has ended."
    vmm.clear_shutdown_exit_code()
    assert vmm.shutdown_exit_code() is None
    assert machine.send("PATCH", "/vm", PAUSE) is None


def test_closing_releases_everything(tmp_path: Path, log: Any) -> None:
    directory = tmp_path / "ipc"
    directory.mkdir()
    before = open_descriptors()
    machine = Machine(directory)
    machine.start()
    with machine.vmm as vmm:
        pids = [worker.pid for worker in vmm.vcpus_handles]
    vmm.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    machine.close()
    assert open_descriptors() == before


def documentation() -> dict[str, str]:
    """Return the docstrings of the methods by name; from the source, since compiled modules have none."""
    found: dict[str, str] = {}
    for module in ("device_operations", "vmm"):
        for node in ast.walk(ast.parse((ROOT / "vmm" / "machine" / f"{module}.py").read_text())):
            if isinstance(node, ast.ClassDef) and node.name in ("DeviceOperations", "Vmm"):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                found |= {each.name: ast.get_docstring(each) or "" for each in methods}
    return found


@pytest.mark.parametrize("name", sorted({each[0] for each in CALLS} | set(DIRECT)))
def test_every_method_says_what_reaches_it(name: str) -> None:
    documented = documentation()[name]
    assert documented
    calls = {f"{method} /{path.split('/')[1]}" for each, method, path, _ in CALLS if each == name}
    assert all(call in documented for call in calls), (documented, calls)
