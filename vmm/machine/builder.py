"""Builds a microVM from its resources: memory, devices, kernel, workers. Leaves nothing behind when it fails."""

from __future__ import annotations

import os

from base import faults
from base.errors import CellblockError
from base.event_manager import EventManager
from ipc import bounds
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import LaunchPlan
from ipc.messages.records import BootRegisters, CpuidEntry
from ipc.messages.worker import HostCpuRead, ReadHostCpu
from vmm import file_limit, stall_watch
from vmm.cells.clocks import synchronise_clocks
from vmm.cells.pool import WorkerPool
from vmm.cells.supervisor import SupervisorClient
from vmm.cells.vms import WorkerVms
from vmm.cells.worker import Worker
from vmm.config.resources import VmResources
from vmm.cpu_config.setup import CpuSetup, cpu_setup
from vmm.layout import ram_regions
from vmm.machine.assembly import Assembly, configuration, open_console
from vmm.machine.kernel import load_boot_source
from vmm.machine.vmm import Vmm
from vmm.observe.logger import LOG
from vmm.placement import Placement, decide, warning

MIB = 1 << 20


class MicrovmBuilder:
    """Makes microVMs (one at a time) out of a supervisor, an event loop and the workers of a pool."""

    def __init__(self, plan: LaunchPlan, events: EventManager, supervisor: SupervisorClient) -> None:
        self._plan = plan
        self._events = events
        self._supervisor = supervisor
        self._pool = WorkerPool(plan, events, supervisor)
        self._limits_lowered = False

    def bind(self) -> None:
        """Make what has to exist when the filter goes on (:meth:`WorkerPool.bind`)."""
        self._pool.bind()

    def prepare(self) -> None:
        """Ask for worker 0 without waiting for it."""
        self._pool.fork_ahead()

    def build(self, resources: VmResources, *, run: bool = True) -> Vmm:
        """Build and start a microVM (InstanceStart); without ``run`` it stays paused before its first instruction.

        Raises VmmError; then nothing of it is left.
        """
        faults.visit("vmm.instance_start")
        stall_watch.alive()  # workers get descriptors of ours from here on; when it runs, the heartbeat goes on
        size = resources.machine_config.mem_size_mib * MIB
        descriptor = self._supervisor.create_memory(size)
        try:
            with file_limit.Tolerated():  # memory is no file: who cannot write it as one has other ways
                vmm = self._build(resources, size, descriptor, run=run)
        except BaseException:
            stall_watch.off()
            raise
        finally:
            os.close(descriptor)  # the mappings keep it alive
        if not self._limits_lowered:  # what the plan has bounded until now is bounded by this machine from here on
            self._limits_lowered = True
            bounds.guest_runs(size, unpacks_again=resources.machine_config.restarts)
        return vmm

    def _build(self, resources: VmResources, size: int, descriptor: int, *, run: bool) -> Vmm:
        memory = GuestMemory(descriptor, size, ram_regions(size))
        try:
            machine = resources.machine_config
            placement = decide(machine.vcpu_placement, machine.vcpu_count, self._plan, machine.affinity)
            vms = WorkerVms([], placement.destination)
            shown = vms.map_guest_memory(memory, track_dirty_pages=machine.track_dirty_pages)
            self._pool.spawn(placement)
            self._pool.tell(shown)  # a worker maps the memory while devices are made and the kernel is loaded
            assembly = self._assemble(resources, memory, placement, vms)
        except (CellblockError, OSError):
            self._pool.end()
            memory.close()
            raise
        if machine.vcpu_count > 1:
            _log_placement(placement, self._plan)
        try:
            assembly.attach_devices(resources.options, self._plan)
            if resources.has_virtio_devices:
                from vmm.machine import device_cells

                device_cells.attach(assembly, resources, self._pool, self._events)
            with bounds.Unpacking():
                boot = load_boot_source(resources, memory, self._plan, assembly.devices.virtio_mmio_devices())
            faults.visit("vmm.kernel_loaded")
            self._start_workers(assembly, resources, boot)
            if assembly.vmm.device_cells is not None:
                assembly.vmm.device_cells.wait_ready()
            faults.visit("vmm.configured")
            assembly.vmm.start_vcpus()
            if run:
                assembly.vmm.resume_vm()
        except BaseException:
            self._pool.end()
            assembly.vmm.close()
            raise
        return assembly.vmm

    def _assemble(self, resources: VmResources, memory: GuestMemory, placement: Placement, vms: WorkerVms) -> Assembly:
        console = open_console(resources, self._plan)
        try:
            assembly = Assembly(
                self._events,
                self._plan.microvm_id,
                memory,
                placement,
                vms,
                console=console,
                restarts=resources.machine_config.restarts,
            )
        except (CellblockError, OSError):
            console.close()
            raise
        assembly.make_successor = self._pool.make_successor
        return assembly

    def _start_workers(self, assembly: Assembly, resources: VmResources, boot: BootRegisters) -> None:
        workers = self._pool.greeted(assembly.placement)
        setup = _cpu_setup(resources, workers[0])
        assembly.prepare(configuration(resources, boot, setup))
        for worker in workers:
            assembly.add_worker(worker)
        assembly.connect()
        if resources.machine_config.vcpu_count > 1:
            synchronise_clocks(workers)

    def close(self) -> None:
        """End workers that were never used and the ZeroMQ context."""
        self._pool.close()


def _cpu_setup(resources: VmResources, worker: Worker) -> CpuSetup:
    """Return what the CPU template comes to on this host. Raises VmmError."""

    def read_host() -> tuple[CpuidEntry, ...]:
        return worker.request(ReadHostCpu(), HostCpuRead).cpuid

    return cpu_setup(resources.machine_config.cpu_template, resources.cpu_template, read_host)


def _log_placement(placement: Placement, plan: LaunchPlan) -> None:
    groups = "/".join(",".join(map(str, group)) for group in placement.groups)
    LOG.info(f"vCPU placement: {placement.kind} ({placement.reason}), workers {groups}")
    if text := warning(placement, plan):
        LOG.warn(text)
