"""A worker's VM and its vCPUs: made before the worker is sealed, configured by the controller later.

What needs /dev/kvm (making the VM and its vCPUs, asking what the host supports) happens at once when the worker
starts; InstanceStart does not wait for it, and the sealed worker needs neither those ioctls nor the descriptor.
"""

from __future__ import annotations

import mmap
import os

from base.lean_typing import Sequence
from ipc.device_pages import DEVICE_PAGE_SIZE, slots_of
from ipc.exit_ring import RING_SIZE, ExitRingProducer
from ipc.launch_plan import Assignment
from ipc.messages.ghosts import OpenIpiSource, OpenIpiTarget
from ipc.messages.records import BootRegisters, CapabilityDemand, Route
from ipc.messages.worker import Configure
from ipc.shared_memory import map_shared
from vcpu_worker.cpu import boot_state, cpuid, msr
from vcpu_worker.cpu.msr import state_indices
from vcpu_worker.cpu.topology import Topology
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import CapabilityError, ConfigurationError, KvmError
from vcpu_worker.ghosts import stub
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.system import KvmSystem, describe_missing
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.kvm.vm import KvmVm, MsiRoute
from vcpu_worker.run_loop import RunLoop
from vcpu_worker.windows import Windows

#: KVM_CHECK_EXTENSION takes an int.
_MAX_CAPABILITY = (1 << 31) - 1
#: MSI data: INIT, level asserted.
_INIT = 0x4500


class Vcpu:
    """One vCPU of this worker: KVM's side of it and, once configured, its run loop."""

    __slots__ = ("kvm", "loop", "ring")

    def __init__(self, kvm: KvmVcpu) -> None:
        self.kvm = kvm
        self.ring: ExitRingProducer | None = None
        self.loop: RunLoop | None = None

    @property
    def index(self) -> int:
        """The guest's number of this vCPU (and its APIC id)."""
        return self.kvm.index


class Machine:
    """The VM of this worker. Raises WorkerError from every method; a failed ``configure`` cannot be repeated.

    ``single_step`` says how ghosts trap a renewed INIT (vcpu_worker.ghosts.ghost).
    """

    def __init__(self, system: KvmSystem, assignment: Assignment, *, single_step: bool = False) -> None:
        system.check_version()
        #: Required capabilities that this host lacks; told at Configure, since a CPU template can waive them.
        self._missing = system.missing_capabilities()
        self.supported_cpuid = system.supported_cpuid()
        self.state_msrs = state_indices(system.msr_index_list())
        try:
            self.vm = KvmVm(system)
            mmap_size = system.vcpu_mmap_size()
            self.vcpus = [Vcpu(KvmVcpu(self.vm, index, mmap_size)) for index in assignment.vcpus]
            self.ghost_vcpus = [KvmVcpu(self.vm, index, mmap_size) for index in assignment.ghosts]
        except KvmError:
            if self._missing:
                raise CapabilityError(describe_missing(self._missing)) from None
            raise
        self.single_step = single_step
        self._stub = stub.StubMemory() if self.ghost_vcpus else None
        self._sync_regs = self.vm.extension(abi.KVM_CAP_SYNC_REGS) & (
            abi.SYNC_X86_REGS | abi.SYNC_X86_SREGS | abi.SYNC_X86_EVENTS
        )
        self.windows = Windows()
        self._interrupts: dict[int, int] = {}
        #: The eventfd of the 8259s' INTR, if vCPU 0 is one of ours; else -1.
        self.external_interrupt = -1
        #: GSIs whose irqfds were taken away for another worker.
        self._handed_over: tuple[int, ...] = ()
        self._mappings: list[mmap.mmap] = []

    # ------------------------------------------------------------ Configure

    def configure(self, command: Configure, descriptors: DescriptorSet) -> None:
        """Do what concerns all vCPUs: rings, run loops, the ghosts' stub. Takes the descriptors it needs."""
        if [vcpu.index for vcpu in self.vcpus] != list(command.vcpus):
            raise ConfigurationError(
                f"this worker was made for vCPUs {[vcpu.index for vcpu in self.vcpus]}, not {list(command.vcpus)}"
            )
        if command.vcpu_count != len(self.vcpus) + len(self.ghost_vcpus):
            raise ConfigurationError(
                f"this worker was made for a guest of {len(self.vcpus) + len(self.ghost_vcpus)} vCPUs, "
                f"not {command.vcpu_count}"
            )
        self._check_capabilities(command.capabilities)
        # Whatever a template set is part of the state, whether KVM lists it or not.
        self.state_msrs = state_indices((*self.state_msrs, *(change.register for change in command.msr_changes)))
        if self._stub is not None:
            self._stub.give_to(self.vm)
        self.external_interrupt = descriptors.external_interrupt()
        slots = slots_of(self._map(descriptors.device_page(), DEVICE_PAGE_SIZE, writable=False))
        for vcpu in self.vcpus:
            ring, doorbell, completion = descriptors.exit_ring(vcpu.index)
            mapping = self._map(ring, RING_SIZE, writable=True)
            vcpu.ring = ExitRingProducer(mapping, doorbell, completion, attached=not command.resumes_other)
            vcpu.loop = RunLoop(
                vcpu.kvm,
                vcpu.ring,
                slots,
                self.windows,
                # Writes of different vCPUs are ordered by the guest's own locks: none may wait in one ring while a
                # later one, in another, is executed.
                posts=command.vcpu_count == 1,
                start_held=bool(self.ghost_vcpus) and vcpu.index != 0,
            )

    def _check_capabilities(self, demands: Sequence[CapabilityDemand]) -> None:
        """Raise CapabilityError if the host lacks what is required after the template's additions and removals."""
        waived = {demand.number for demand in demands if not demand.required}
        lacking = [number for number in self._missing if number not in waived]
        for demand in demands:
            if demand.required and demand.number not in lacking and not self._has_capability(demand.number):
                lacking.append(demand.number)
        if lacking:
            raise CapabilityError(describe_missing(lacking))

    def _has_capability(self, number: int) -> bool:
        return number <= _MAX_CAPABILITY and self.vm.extension(number) > 0

    def _map(self, descriptor: int, size: int, *, writable: bool) -> mmap.mmap:
        """Map a shared object; its descriptor is closed."""
        try:
            mapping = map_shared(descriptor, size, writable=writable)
        finally:
            os.close(descriptor)
        self._mappings.append(mapping)
        return mapping

    def configure_vcpu(self, vcpu: Vcpu, command: Configure) -> int:
        """Give a vCPU its CPUID, MSRs and registers; return its TSC frequency in kHz. The vCPU's thread only.

        The order matters: CPUID decides which MSRs exist, and KVM rebuilds its map of APIC ids when a LAPIC is
        written, not when a vCPU is added (Linux arch/x86/kvm/lapic.c, kvm_recalculate_apic_map): without this, MSIs
        to the newest vCPU are dropped.
        """
        kvm = vcpu.kvm
        self.configure_kvm(kvm, command)
        if vcpu.index == 0:
            self._set_boot_registers(kvm, command.boot)
        kvm.run64[abi.RUN_VALID_REGS // 8] = self._sync_regs
        return kvm.tsc_khz()

    def configure_kvm(self, kvm: KvmVcpu, command: Configure) -> None:
        """Give a vCPU or a ghost what every one gets. Its own thread only.

        MSRs come after CPUID, which decides (since Linux 6.13 also for us) which of them can be read.
        """
        topology = Topology(kvm.index, command.vcpu_count, command.smt)
        kvm.set_cpuid(cpuid.normalise(command.cpuid or self.supported_cpuid, topology, host=self.supported_cpuid))
        base = kvm.get_msrs([change.register for change in command.msr_changes])
        kvm.set_msrs(msr.boot_msrs(base, command.msr_changes))
        kvm.set_fpu(boot_state.boot_fpu())
        kvm.set_lapic(boot_state.boot_lapic(kvm.get_lapic()))

    @staticmethod
    def _set_boot_registers(kvm: KvmVcpu, boot: BootRegisters) -> None:
        kvm.set_sregs(boot_state.boot_sregs(kvm.get_sregs(), boot))
        kvm.set_regs(boot_state.boot_regs(boot))

    # ------------------------------------------------------------ interrupts

    def add_interrupt(self, gsi: int, eventfd: int) -> None:
        """Take the eventfd of a GSI; one that the GSI had before is not bound any more, and closed."""
        self.vm.deassign_irqfd(gsi)
        before = self._interrupts.get(gsi, -1)
        self._interrupts[gsi] = eventfd
        if before >= 0:
            os.close(before)

    def set_routes(self, routes: Sequence[Route]) -> None:
        """Put routes into force. Order: masked irqfds go first, then the table changes, then unmasked ones come.

        What a device signals while its GSI is masked stays in the eventfd and is injected when the irqfd comes back.
        """
        for route in routes:
            if route.gsi not in self._interrupts:
                raise ConfigurationError(f"no eventfd was handed over for GSI {route.gsi}")
        table = dict(self.vm.routes)
        for route in routes:
            if route.masked:
                self.vm.deassign_irqfd(route.gsi)
            else:
                table[route.gsi] = MsiRoute(route.address, route.data)
        self.vm.set_routes(table)
        for route in routes:
            if not route.masked:
                self.vm.assign_irqfd(route.gsi, self._interrupts[route.gsi])

    # ------------------------------------------------------------ what other workers' vCPUs send

    def _address(self, vcpu: int) -> int:
        if all(each.index != vcpu for each in self.vcpus):
            raise ConfigurationError(f"this worker does not run vCPU {vcpu}")
        return abi.MSI_ADDRESS_BASE | vcpu << abi.MSI_DESTINATION_SHIFT

    def signal(self, vcpu: int, data: int) -> bool:
        """Send an MSI to one of our own vCPUs; False if its LAPIC did not take it."""
        return self.vm.signal_msi(self._address(vcpu), data)

    def send_init(self, ghost: int) -> None:
        """Let the ghost of a vCPU wait for a SIPI, as it did in another worker."""
        self.vm.signal_msi(abi.MSI_ADDRESS_BASE | ghost << abi.MSI_DESTINATION_SHIFT, _INIT)

    def open_ipi_target(self, command: OpenIpiTarget, eventfd: int) -> None:
        """Let ``eventfd`` raise a vector in one of our vCPUs; what it counts comes at once. Takes the eventfd."""
        self._take_paths(((command, eventfd),))
        self.vm.assign_irqfd(command.gsi, eventfd)

    def _take_paths(self, paths: Sequence[tuple[OpenIpiTarget, int]]) -> None:
        """Make the routes of paths to our own vCPUs, and keep their eventfds: to take an irqfd away needs them, too."""
        table = dict(self.vm.routes)
        try:
            for path, _ in paths:
                if path.gsi in table:
                    raise ConfigurationError(f"GSI {path.gsi} has a route already")
                table[path.gsi] = MsiRoute(self._address(path.vcpu), path.vector)
        except ConfigurationError:
            for _, eventfd in paths:
                os.close(eventfd)
            raise
        self._interrupts.update({path.gsi: eventfd for path, eventfd in paths})
        self.vm.set_routes(table)

    # ------------------------------------------------------------ replacement

    def hand_over(self) -> None:
        """Take every irqfd away. What is signalled afterwards waits in the eventfds; what came before is in the LAPICs.

        KVM_IRQFD returns from taking one away when the injections that it has begun are done (irqfd_shutdown()
        flushes them).
        """
        gone = list(self._handed_over)
        for gsi in self.vm.assigned_irqfds():
            self.vm.deassign_irqfd(gsi)
            gone.append(gsi)
        self._handed_over = tuple(gone)

    def roll_back(self) -> None:
        """Undo :meth:`hand_over`; no other VM may have the irqfds any more."""
        gone, self._handed_over = self._handed_over, ()
        for gsi in gone:
            self.vm.assign_irqfd(gsi, self._interrupts[gsi])

    def take_over(self, routes: Sequence[Route], paths: Sequence[tuple[OpenIpiTarget, int]]) -> None:
        """Bind the interrupts that another worker has handed over."""
        self._take_paths(paths)
        self.set_routes(routes)
        for path, eventfd in paths:
            self.vm.assign_irqfd(path.gsi, eventfd)

    # ------------------------------------------------------------ ghosts' paths

    def open_ipi_source(self, command: OpenIpiSource, eventfd: int) -> None:
        """Let the stub of a ghost signal ``eventfd``, which is closed here, when this vector reaches it."""
        try:
            if all(each.index != command.vcpu for each in self.ghost_vcpus):
                raise ConfigurationError(f"vCPU {command.vcpu} is no ghost of this worker")
            self.vm.assign_ioeventfd(eventfd, stub.PORT + command.vcpu, 1, command.vector, port=True)
        finally:
            os.close(eventfd)
