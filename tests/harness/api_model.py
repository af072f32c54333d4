"""What a client may expect of every request of the API, as a model that random sequences are compared with.

It is written from the documentation (docs/formats/api.md), not from the controller.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.harness.api import Api

PREBOOT = "The requested operation is not supported before starting the microVM."
POSTBOOT = "The requested operation is not supported after starting the microVM."
NO_PCI = "PCI is not enabled"
DEVICE = "Failed perform action on device: Device not found"
NAMES = st.sampled_from(["a", "b", "c"])
NOT_STARTED, RUNNING, PAUSED = "Not started", "Running", "Paused"


class ApiModel(RuleBasedStateMachine):
    """What a client may expect of every request, in every state."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.kernel = str(Path(self.directory.name) / "kernel")
        Path(self.kernel).write_bytes(b"kernel")
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.api = self.make_api(Path(self.directory.name))
        self.state = NOT_STARTED
        self.kernel_set = False
        self.memory = 128
        self.vcpus = 1
        self.template: str | None = None
        self.custom_template = False
        self.balloon: int | None = None
        self.drives: dict[str, bool] = {}
        self.pmem: dict[str, bool] = {}
        self.interfaces: dict[str, str] = {}
        self.devices: set[str] = set()
        self.mmds: Any = None
        self.mmds_initialized = False
        self.metrics = False
        self.boot_specific = False

    def make_api(self, directory: Path) -> Any:
        """Return what answers; another kind of it may set ``kernel``, too."""
        return Api(str(directory / "log"))

    @initialize(state=st.sampled_from([NOT_STARTED, NOT_STARTED, RUNNING, PAUSED]))
    def begin(self, state: str) -> None:
        """Begin anywhere: a random sequence hardly ever gets as far as a start, with all that stands in its way."""
        if state == NOT_STARTED:
            return
        self.boot_source(there=True)
        self.instance_start()
        if state == PAUSED:
            self.change_state(PAUSED)
        assert self.state == state

    def teardown(self) -> None:
        self.api.close()
        assert len(os.listdir("/proc/self/fd")) == self.descriptors
        self.directory.cleanup()

    def put(self, path: str, body: Any, refusal: str | None, method: str = "PUT") -> bool:
        """Send a request whose outcome is known; return whether it was to be executed."""
        expected = (204, None) if refusal is None else (400, {"fault_message": refusal})
        assert self.api.send(method, path, body) == expected
        return refusal is None

    @property
    def started(self) -> bool:
        return self.state != NOT_STARTED

    def preboot(self, refusal: str | None = None) -> str | None:
        """Return why something that is possible only before the start is refused."""
        return POSTBOOT if self.started else refusal

    # -- configuration ------------------------------------------------------------------------------------------------

    @rule(memory=st.sampled_from([0, 1, 64, 128, 256]), vcpus=st.sampled_from([0, 1, 2, 32, 33]), patch=st.booleans())
    def machine_config(self, memory: int, vcpus: int, patch: bool) -> None:
        self.set_machine(memory, vcpus, patch)

    def set_machine(self, memory: int, vcpus: int, patch: bool) -> None:
        refusal = None
        if not 1 <= vcpus <= 32:
            refusal = (
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an "
                "even number if SMT is enabled."
            )
        elif not memory:
            refusal = (
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page "
                "size."
            )
        elif self.balloon is not None and memory < self.balloon:
            refusal = (
                "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target "
                "size."
            )
        body = {"mem_size_mib": memory, "vcpu_count": vcpus}
        if self.put("/machine-config", body, self.preboot(refusal), "PATCH" if patch else "PUT"):
            self.memory, self.vcpus, self.boot_specific = memory, vcpus, True

    @rule(template=st.sampled_from(["T2", "None"]))
    def static_template(self, template: str) -> None:
        self.set_template(template)

    def set_template(self, template: str) -> None:
        if self.put("/machine-config", {"cpu_template": template}, self.preboot(), "PATCH"):
            self.template = None if template == "None" else template
            self.custom_template = False
            self.boot_specific = True

    @rule()
    def cpu_config(self) -> None:
        if self.put("/cpu-config", {"kvm_capabilities": ["!1"]}, self.preboot()):
            self.custom_template, self.template = True, None

    @rule(there=st.booleans())
    def boot_source(self, there: bool) -> None:
        refusal = "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"
        path = self.kernel if there else "/nix/kernel"
        if self.put("/boot-source", {"kernel_image_path": path}, self.preboot(None if there else refusal)):
            self.kernel_set = self.boot_specific = True

    @rule(name=NAMES, root=st.booleans(), there=st.booleans())
    def drive(self, name: str, root: bool, there: bool) -> None:
        path = self.kernel if there else "/nix/disk"
        refusal = None
        if self.started:
            refusal = NO_PCI
        elif root and (any(self.pmem.values()) or any(r for n, r in self.drives.items() if n != name)):
            refusal = "Drive config error: A root block device already exists!"
        elif not there:
            refusal = (
                "Drive config error: Unable to create the virtio block device: Virtio backend error: Error "
                f"manipulating the backing file: No such file or directory (os error 2) {path}"
            )
        if self.put(f"/drives/{name}", {"drive_id": name, "is_root_device": root, "path_on_host": path}, refusal):
            self.drives[name] = root
            self.boot_specific = True

    @rule(name=NAMES, root=st.booleans())
    def pmem_device(self, name: str, root: bool) -> None:
        refusal = None
        if self.started:
            refusal = NO_PCI
        elif root and any(self.drives.values()):
            refusal = (
                "Pmem config error: Attempt to add pmem as a root device while the root device defined as a block "
                "device"
            )
        elif root and any(r for n, r in self.pmem.items() if n != name):
            refusal = "Pmem config error: A root pmem device already exist"
        if self.put(f"/pmem/{name}", {"id": name, "path_on_host": "x", "root_device": root}, refusal):
            self.pmem[name] = root
            self.boot_specific = True

    @rule(name=NAMES, mac=st.sampled_from(["02:00:00:00:00:01", "02:00:00:00:00:02"]))
    def interface(self, name: str, mac: str) -> None:
        refusal = None
        if self.started:
            refusal = NO_PCI
        elif any(m == mac for n, m in self.interfaces.items() if n != name):
            refusal = f"Network config error: The MAC address is already in use: {mac}"
        body = {"iface_id": name, "host_dev_name": f"tap{name}", "guest_mac": mac}
        if self.put(f"/network-interfaces/{name}", body, refusal):
            self.interfaces[name] = mac
            self.boot_specific = True

    @rule(names=st.lists(NAMES, max_size=2))
    def mmds_config(self, names: list[str]) -> None:
        refusal = None
        if not names:
            refusal = "The list of network interface IDs that allow forwarding MMDS requests is empty."
        elif not set(names) <= self.interfaces.keys():
            refusal = (
                "The list of network interface IDs provided contains at least one ID that does not correspond to any "
                "existing network interface."
            )
        refusal = None if refusal is None else f"MMMDS config error: {refusal}"
        if self.put("/mmds/config", {"network_interfaces": names, "version": "V2"}, self.preboot(refusal)):
            self.boot_specific = True

    @rule(amount=st.sampled_from([0, 1, 64, 128, 1024]))
    def set_balloon(self, amount: int) -> None:
        refusal = "Balloon config error: Amount of pages requested is too large." if amount > self.memory else None
        if self.put("/balloon", {"amount_mib": amount, "deflate_on_oom": True}, self.preboot(refusal)):
            self.balloon, self.boot_specific = amount, True

    @rule(
        device=st.sampled_from(
            [
                ("/vsock", {"guest_cid": 3, "uds_path": "v"}, "vsock"),
                ("/entropy", {}, "entropy"),
                ("/hotplug/memory", {"total_size_mib": 128}, "memory-hotplug"),
            ]
        )
    )
    def other_device(self, device: tuple[str, Any, str]) -> None:
        path, body, section = device
        if self.put(path, body, self.preboot()):
            self.devices.add(section)
            self.boot_specific = True

    @rule(there=st.booleans())
    def put_metrics(self, there: bool) -> None:
        prefix = "Metrics error: Cannot initialize the metrics system due to bad user input: "
        refusal = None
        if self.metrics:
            refusal = f"{prefix}Reinitialization of metrics not allowed."
        elif not there:
            refusal = f"{prefix}No such file or directory (os error 2)"
        path = str(Path(self.directory.name) / "metrics") if there else "/nix/metrics"
        if self.put("/metrics", {"metrics_path": path}, self.preboot(refusal)):
            self.metrics = True

    @rule(value=st.sampled_from([{"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "x"]), patch=st.booleans())
    def change_mmds(self, value: Any, patch: bool) -> None:
        missing = "MMDS error: The MMDS data store is not initialized."
        if self.started:  # no interface leads to the data store: a machine with one cannot be started yet
            assert not self.put("/mmds", value, missing, "PATCH" if patch else "PUT")
        elif not patch:
            self.put("/mmds", value, None)
            self.mmds, self.mmds_initialized = value, True
        elif self.put("/mmds", value, None if self.mmds_initialized else missing, "PATCH"):
            self.mmds = self.merged(value)

    def merged(self, patch: Any) -> Any:
        """Merge one level of these few patches."""
        if not isinstance(patch, dict):
            return patch
        target = dict(self.mmds) if isinstance(self.mmds, dict) else {}
        (value,) = patch.values()
        if value is None:
            target.pop("a", None)
        elif isinstance(value, dict):
            target["a"] = {**target["a"], **value} if isinstance(target.get("a"), dict) else value
        else:
            target["a"] = value
        return target

    # -- operation ----------------------------------------------------------------------------------------------------

    def why_not_startable(self) -> str | None:
        if not self.kernel_set:
            return "Cannot start microvm without kernel configuration."
        return None

    @rule()
    def instance_start(self) -> None:
        self.start_instance()

    def start_instance(self) -> None:
        reason = self.why_not_startable()
        devices = self.drives or self.pmem or self.interfaces or self.devices or self.balloon is not None
        start = {"action_type": "InstanceStart"}
        if not self.started and reason is None and devices:
            message = self.api.fault("PUT", "/actions", start)
            assert message.startswith("Start microvm error: The ")
            assert message.endswith(" is not yet supported.")
        elif self.put("/actions", start, self.preboot(None if reason is None else f"Start microvm error: {reason}")):
            self.state = RUNNING

    @rule(state=st.sampled_from([PAUSED, "Resumed"]))
    def change_state(self, state: str) -> None:
        if self.put("/vm", {"state": state}, None if self.started else PREBOOT, "PATCH"):
            self.state = PAUSED if state == PAUSED else RUNNING

    @rule(action=st.sampled_from(["FlushMetrics", "SendCtrlAltDel"]))
    def action(self, action: str) -> None:
        self.put("/actions", {"action_type": action}, None if self.started else PREBOOT)

    @rule(
        request=st.sampled_from(
            [
                ("PATCH", "/balloon", {"amount_mib": 1}, f"Balloon update error: {DEVICE}"),
                ("GET", "/balloon/statistics", None, f"Internal VMM error: {DEVICE}"),
                ("PATCH", "/hotplug/memory", {"requested_size_mib": 0}, f"Memory hotplug update error: {DEVICE}"),
                ("DELETE", "/drives/a", None, NO_PCI),
            ]
        )
    )
    def operate_device(self, request: tuple[str, str, Any, str]) -> None:
        method, path, body, refusal = request
        self.put(path, body, refusal if self.started else PREBOOT, method)

    @rule(create=st.booleans())
    def snapshot(self, create: bool) -> None:
        if create:
            refusal = PREBOOT
            if self.started:
                running = "Operation not allowed: save/restore unavailable while running"
                words = running if self.state == RUNNING else "Snapshots are not yet supported."
                refusal = f"Create snapshot error: {words}"
            self.put("/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}, refusal)
            return
        words = (
            "Loading a microVM snapshot not allowed after configuring boot-specific resources."
            if self.boot_specific
            else "Snapshots are not yet supported."
        )
        body = {"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "Uffd"}}
        self.put("/snapshot/load", body, self.preboot(f"Load snapshot error: {words}"))

    @precondition(lambda self: not self.started)
    @rule()
    def get_balloon(self) -> None:
        status, _ = self.api.send("GET", "/balloon")
        assert status == (400 if self.balloon is None else 200)

    # -- what is shown ------------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_shown_as_it_was_set(self) -> None:
        assert self.api.send("GET", "/")[1]["state"] == self.state
        config = self.api.config()
        machine = config["machine-config"]
        assert (machine["mem_size_mib"], machine["vcpu_count"]) == (self.memory, self.vcpus)
        assert machine.get("cpu_template") == self.template
        assert {drive["drive_id"]: drive["is_root_device"] for drive in config["drives"]} == self.drives
        assert not any(drive["is_root_device"] for drive in config["drives"][1:])
        assert {pmem["id"]: pmem["root_device"] for pmem in config["pmem"]} == self.pmem
        assert {net["iface_id"]: net["guest_mac"] for net in config["network-interfaces"]} == self.interfaces
        assert (config["balloon"] or {}).get("amount_mib") == self.balloon
        assert {name for name in ("vsock", "entropy", "memory-hotplug") if config[name] is not None} == self.devices
        assert self.api.send("GET", "/mmds") == (200, self.mmds if self.mmds_initialized else {})
        assert "Traceback" not in self.api.log()
