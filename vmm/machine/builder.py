"""Builds a microVM from its resources: memory, devices, kernel, workers. Leaves nothing behind when it fails."""

from __future__ import annotations

import os
import time

import zmq

from base import faults, threads
from base.errors import CellblockError
from base.event_manager import EventManager
from base.lean_typing import Any, Callable, Sequence
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import FORKED_AHEAD, LaunchPlan
from ipc.messages.ghosts import ClockRead, ClockSet, ReadClock, SetClock
from ipc.messages.records import BootRegisters, CpuidEntry, Route
from ipc.messages.worker import Configure, HostCpuRead, ReadHostCpu
from vmm import file_limit
from vmm.boot.cmdline import Cmdline, complete
from vmm.boot.loader import KIND_BZIMAGE, load_kernel
from vmm.cells.exits import ExitExecutor
from vmm.cells.ghosts import GhostForwarder
from vmm.cells.lifecycle import DEADLINES, WorkerState
from vmm.cells.supervisor import SupervisorClient
from vmm.cells.worker import Worker, WorkerDescriptors
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.cpu_config.setup import CpuSetup, cpu_setup
from vmm.devices.legacy.console import ConsoleInput, ConsoleOutput, monotonic_bucket
from vmm.devices.manager import DeviceManager
from vmm.devices.routing import InterruptRouter
from vmm.errors import WorkerError
from vmm.layout import ram_regions
from vmm.machine.vmm import Vmm, end_workers
from vmm.observe.logger import DEBUG, LOG
from vmm.operations.replacement import Interrupts, Successor
from vmm.placement import Placement, PlacementError, decide, warning

MIB = 1 << 20
#: How long the start waits for a worker that has not said HELLO yet: it can also do so while the kernel is loaded.
WELCOME_NS = 1_000_000
# Values of StartOptions.console (vmm.cli.CONSOLES).
CONSOLE_STDIO = "stdio"
CONSOLE_PTY = "pty"


class MicrovmBuilder:
    """Makes microVMs (one at a time) out of a supervisor, an event loop and workers.

    Workers are forked ahead: :meth:`prepare` asks for the first one when the controller starts, so that InstanceStart
    finds it waiting. One that died meanwhile is replaced.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        self._plan = plan
        self._events = events
        self._supervisor = supervisor
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._workers: dict[int, Worker] = {}
        #: Those that are to replace one of the others, or have.
        self._successors: list[Worker] = []
        supervisor.on_cell_ended = self._cell_ended

    def bind(self) -> None:
        """Make the endpoint of worker 0. That starts ZeroMQ's threads, which have to exist when the filter goes on.

        Raises WorkerError, ThreadError.
        """
        with threads.MadeByLibrary(threads.ZEROMQ_THREADS):
            self._worker(0).bind()

    def prepare(self) -> None:
        """Ask for worker 0 without waiting for it."""
        self._worker(FORKED_AHEAD.worker).spawn(FORKED_AHEAD)

    def _worker(self, index: int) -> Worker:
        worker = self._workers.get(index)
        if worker is None:
            worker = Worker(index, self._plan, self._context, self._events, self._supervisor)
            self._workers[index] = worker
        return worker

    def _cell_ended(self, notice: Any) -> None:
        for worker in [*self._workers.values(), *self._successors]:
            if worker.index == notice.worker:
                worker.cell_ended(notice)

    def make_successor(self, index: int) -> Worker:
        """Return a worker, not spawned yet, that is to take the place of another one."""
        self._successors = [worker for worker in self._successors if worker.alive]
        worker = Worker(index, self._plan, self._context, self._events, self._supervisor)
        self._successors.append(worker)
        return worker

    def build(self, resources: VmResources, *, run: bool = True) -> Vmm:
        """Build and start a microVM (InstanceStart); without ``run`` it stays paused before its first instruction.

        Raises VmmError; then nothing of it is left.
        """
        faults.visit("vmm.instance_start")
        machine = resources.machine_config
        size = machine.mem_size_mib * MIB
        descriptor = self._supervisor.create_memory(size)
        try:
            with file_limit.Tolerated():  # memory is no file: who cannot write it as one has other ways
                return self._build(resources, size, descriptor, run=run)
        finally:
            os.close(descriptor)  # the mappings keep it alive

    def _build(self, resources: VmResources, size: int, descriptor: int, *, run: bool) -> Vmm:
        memory = GuestMemory(descriptor, size, ram_regions(size))
        try:
            machine = resources.machine_config
            placement = decide(machine.vcpu_placement, machine.vcpu_count, self._plan, machine.affinity)
            assembly = _Assembly(self._events, self._plan.microvm_id, memory, placement)
        except (CellblockError, OSError):
            memory.close()
            raise
        vmm = assembly.vmm
        vmm.restarts = machine.restarts
        vmm.replacements.make_successor = lambda predecessor: assembly.successor(
            predecessor, self.make_successor(predecessor.index)
        )
        if machine.vcpu_count > 1:
            _log_placement(placement, self._plan)
        try:
            assembly.attach_devices(resources.options, self._plan)
            assembly.attach_console(resources, self._plan)
            self._welcome(self._spawn_workers(placement))
            boot = load_boot_source(resources, memory, self._plan)
            faults.visit("vmm.kernel_loaded")
            self._start_workers(assembly, resources, boot)
            faults.visit("vmm.configured")
            vmm.start_vcpus()
            if run:
                vmm.resume_vm()
        except BaseException:
            end_workers(list(self._workers.values()))
            vmm.close()
            raise
        return vmm

    def _welcome(self, workers: Sequence[Worker]) -> None:
        """Welcome the workers forked ahead, which say HELLO about now: they go on while the kernel is loaded."""

        def welcomed() -> bool:
            return all(worker.state is not WorkerState.SPAWNED for worker in workers)

        self._events.run_until(welcomed, time.monotonic_ns() + WELCOME_NS)

    def _spawn_workers(self, placement: Placement) -> list[Worker]:
        """Ask for all workers at once; return those forked ahead that fit. One that does not is replaced."""
        count = len(placement.groups)
        if count > self._plan.max_workers:
            raise WorkerError(f"{count} workers are needed, the launch plan allows {self._plan.max_workers}.")
        workers = [self._worker(index) for index in range(count)]
        ahead = [worker for worker in workers if worker.alive]
        unfit = [worker for worker in ahead if worker.assignment != placement.assignment(worker.index)]
        for worker in unfit:
            worker.wait_greeted()  # one that is only starting could not be asked to end in order
            worker.finish()
        for worker in workers:
            if not worker.alive:
                worker.spawn(placement.assignment(worker.index))
        for worker in unfit:
            if not worker.wait_ended(DEADLINES[WorkerState.SPAWNED].nanoseconds):
                raise WorkerError(f"The worker of vCPU {worker.index} cannot be replaced: it does not end.")
            worker.spawn(placement.assignment(worker.index))
        return [worker for worker in ahead if worker not in unfit]

    def _start_workers(self, assembly: _Assembly, resources: VmResources, boot: BootRegisters) -> None:
        workers = [self._worker(index) for index in range(len(assembly.placement.groups))]
        vcpu_count = resources.machine_config.vcpu_count
        for worker in workers:
            if not worker.alive:  # it died while the kernel was loaded
                worker.spawn(assembly.placement.assignment(worker.index))
        for worker in workers:
            worker.wait_greeted()
            if worker.kvm.max_vcpus < vcpu_count:
                raise WorkerError(f"This host's KVM allows {worker.kvm.max_vcpus} vCPUs, not {vcpu_count}.")
        assembly.prepare(resources, boot, _cpu_setup(resources, workers[0]))
        for worker in workers:
            assembly.make_rings(worker)
            worker.configure(assembly.configuration(worker.assignment.vcpus), assembly.descriptors(worker))
            assembly.vmm.attach_worker(worker)
        assembly.connect()
        if vcpu_count > 1:
            synchronise_clocks(workers)

    def close(self) -> None:
        """End workers that were never used and the ZeroMQ context."""
        workers = [*self._workers.values(), *self._successors]
        end_workers(workers)
        for worker in workers:
            worker.close()
        self._context.destroy(linger=0)


def load_boot_source(resources: VmResources, memory: GuestMemory, plan: LaunchPlan) -> BootRegisters:
    """Load kernel and initrd into guest memory and log how. Raises LayoutError or a BootError."""
    options = resources.options
    source = resources.require_boot_source()
    cache = options.kernel_cache_fd if options.kernel_cache_fd >= 0 else plan.kernel_cache_fd
    cmdline = Cmdline(source.command_line)
    complete(cmdline, pci=False)
    image = load_kernel(
        memory,
        source.kernel_fd,
        cmdline,
        source.initrd_fd if source.initrd_fd >= 0 else None,
        vcpu_count=resources.machine_config.vcpu_count,
        cache_fd=cache,
        unpack=options.unpack_kernel,
        entry=options.kernel_entry,
        huge_pages=plan.huge_pages,
    )
    mark = " (bzImage)" if image.kind == KIND_BZIMAGE else ""
    LOG.info(f"Kernel loaded using {image.protocol} boot protocol{mark}")
    if image.note:
        LOG.warn(image.note)
    if LOG.level >= DEBUG:
        steps = ", ".join(f"{step} {nanoseconds // 1000} us" for step, nanoseconds in image.timings)
        LOG.debug(f"Kernel loading took: {steps}")
    return image.registers


def _cpu_setup(resources: VmResources, worker: Worker) -> CpuSetup:
    """Return what the CPU template comes to on this host. Raises VmmError."""

    def read_host() -> tuple[CpuidEntry, ...]:
        return worker.request(ReadHostCpu(), HostCpuRead).cpuid

    return cpu_setup(resources.machine_config.cpu_template, resources.cpu_template, read_host)


def synchronise_clocks(workers: Sequence[Worker]) -> None:
    """Give all vCPUs of all workers one TSC and, as nearly as the host can, one kvmclock. Raises WorkerError."""
    first, *others = workers
    first.clock_ahead_ns = 0
    clock = first.request(ReadClock(), ClockRead)
    if others and not clock.has_tsc_offset:
        LOG.warn("This host's KVM cannot align the time stamp counters of several workers (Linux 5.16 can).")
    pending = [(worker, worker.submit(SetClock(*clock))) for worker in others]
    for worker, sequence in pending:
        reached = worker.collect(sequence, ClockSet)
        worker.clock_ahead_ns = None
        if reached.measured:
            difference = worker.clock_ahead_ns = reached.nanoseconds if reached.ahead else -reached.nanoseconds
            LOG.debug(f"The kvmclock of worker vcpu {worker.index} is {difference} ns ahead of that of worker vcpu 0.")


def _log_placement(placement: Placement, plan: LaunchPlan) -> None:
    groups = "/".join(",".join(map(str, group)) for group in placement.groups)
    LOG.info(f"vCPU placement: {placement.kind} ({placement.reason}), workers {groups}")
    if text := warning(placement, plan):
        LOG.warn(text)


class _Assembly:
    """The parts of one microVM while it is being put together."""

    def __init__(
        self,
        events: EventManager,
        microvm_id: str,
        memory: GuestMemory,
        placement: Placement,
    ) -> None:
        self._memory = memory
        self.placement = placement
        self._executors: dict[int, ExitExecutor] = {}
        self._rings: list[ExitExecutor] = []
        self._message: Configure | None = None
        self._ghosts: GhostForwarder | None = None
        self._output: ConsoleOutput | None = None
        devices = DeviceManager(transmit=self._transmit, reset=self._reset, set_routes=self._set_routes, log=LOG.warn)
        self.devices = devices
        self.vmm = Vmm(microvm_id, events, memory, devices, placement)
        #: Its list of workers is everybody's: a worker that is replaced is replaced there.
        self._router = InterruptRouter(self.vmm.vcpus_handles, self._owner)

    def _transmit(self, byte: int) -> None:
        if self._output is not None:
            self._output.transmit(byte)

    def _reset(self) -> None:
        self.vmm.guest_reset()

    def _set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Device interrupts are bound in the VM of the worker that runs the destination vCPU."""
        self._router.set_routes(routes, done)

    def _owner(self, apic_id: int) -> int:
        try:
            return self.placement.owner(apic_id)
        except PlacementError:
            return -1

    def connect(self) -> None:
        """Let the workers' ghosts reach the other workers."""
        self._ghosts = GhostForwarder(self.placement, self.vmm.vcpus_handles, self.vmm.forwarding_failed)
        self.vmm.attach_ghosts(self._ghosts)

    def successor(self, predecessor: Worker, worker: Worker) -> Successor:
        """Return what is needed to let a worker go on for another one."""
        vcpus = predecessor.assignment.vcpus

        def interrupts() -> Interrupts:
            placed = self._router.placed(predecessor.index)
            routes = [route for route in self.devices.ioapic.routes() if route.gsi in placed]
            return Interrupts(routes, self._ghosts.paths_to(vcpus) if self._ghosts is not None else ())

        return Successor(worker, self.configuration(vcpus), self.descriptors(predecessor), interrupts)

    def attach_devices(self, options: StartOptions, plan: LaunchPlan) -> None:
        """Attach what the command line asks for beside the standard devices."""
        if options.boot_timer:
            start = plan.start_time_us or time.monotonic_ns() // 1000
            # What the parent has used until it forked us is not in our own CPU time.
            self.devices.attach_boot_timer(start, plan.start_time_cpu_us - plan.parent_cpu_time_us)
        if options.exerciser:
            self.devices.attach_exerciser(self.vmm.stop)

    def attach_console(self, resources: VmResources, plan: LaunchPlan) -> None:
        """Connect COM1 with a file, standard input and output, a pseudo-terminal, or nothing."""
        console = resources.options.console
        limiter = resources.serial.rate_limiter
        bucket = monotonic_bucket(limiter.size, limiter.refill_time, limiter.one_time_burst) if limiter else None
        console_input: ConsoleInput | None = None
        descriptor = resources.open_serial_output()
        if descriptor >= 0:
            self._output = ConsoleOutput(descriptor, owned=True, bucket=bucket)
            source = 0 if console == CONSOLE_STDIO else -1
        elif console == CONSOLE_PTY:
            self._output = ConsoleOutput(os.dup(plan.console_fd), owned=True, bucket=bucket)
            source = plan.console_fd
        elif console == CONSOLE_STDIO:
            self._output = ConsoleOutput(1, owned=False, bucket=bucket)
            source = 0
        else:
            source = -1
        if source >= 0:
            console_input = ConsoleInput(source, self.devices.serial)
            console_input.set_raw()
        self.vmm.attach_console(self._output, console_input)

    def make_rings(self, worker: Worker) -> None:
        """Make the exit rings of a worker's vCPUs."""
        for vcpu in worker.assignment.vcpus:
            self._executors[vcpu] = self._executor(worker, vcpu)

    def _executor(self, worker: Worker, vcpu: int) -> ExitExecutor:

        def failed(text: str) -> None:
            owner = next((each for each in self.vmm.vcpus_handles if each.index == worker.index), worker)
            owner.breach(f"exit ring: {text}")

        executor = ExitExecutor(
            self.devices.ports,
            self.devices.mmio,
            before_batch=self.devices.begin_batch,
            after_batch=self.vmm.after_exits,
            failed=failed,
            rings=self._rings,
        )
        self.vmm.attach_executor(vcpu, executor)
        return executor

    def prepare(self, resources: VmResources, boot: BootRegisters, setup: CpuSetup) -> None:
        """Make the Configure message, once everything is attached; workers differ in their vCPUs only."""
        machine = resources.machine_config
        self._message = Configure(
            vcpu_count=machine.vcpu_count,
            smt=machine.smt,
            vcpus=(),
            regions=self._memory.regions,
            memory_size=machine.mem_size_mib * MIB,
            boot=boot,
            ports=self.devices.ports.windows(),
            mmio=self.devices.mmio.windows(),
            interrupts=tuple(line.gsi for line in self.devices.interrupts),
            track_dirty_pages=machine.track_dirty_pages,
            resumes_other=False,
            cpuid=setup.cpuid,
            msr_changes=setup.msr_changes,
            capabilities=setup.capabilities,
        )

    def configuration(self, vcpus: tuple[int, ...]) -> Configure:
        """Return the Configure message for the worker of ``vcpus``."""
        assert self._message is not None
        return self._message._replace(vcpus=vcpus)

    def descriptors(self, worker: Worker) -> WorkerDescriptors:
        """Return the descriptors that a worker in this place gets."""
        executors = [(vcpu, self._executors[vcpu]) for vcpu in worker.assignment.vcpus]
        return WorkerDescriptors(
            guest_memory=self._memory.descriptor,
            memory_size=self._memory.size,
            device_page=self.devices.page_descriptor,
            rings=tuple(
                (vcpu, executor.descriptor, executor.doorbell, executor.completion) for vcpu, executor in executors
            ),
            interrupts=tuple((line.gsi, line.eventfd) for line in self.devices.interrupts),
        )
