"""Puts the parts of one microVM together, so that each holds what it calls; vmm.machine.builder brings the workers."""

from __future__ import annotations

import os
import time

from base.event_manager import EventManager
from base.lean_typing import Callable, NamedTuple
from base.token_bucket import TokenBucket
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import LaunchPlan
from ipc.messages.records import BootRegisters
from ipc.messages.worker import Configure
from vmm.cells.exits import ExitExecutor
from vmm.cells.ghosts import GhostForwarder
from vmm.cells.worker import Worker, WorkerDescriptors
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.cpu_config.setup import CpuSetup
from vmm.devices.legacy.console import ConsoleInput, ConsoleOutput
from vmm.devices.manager import DeviceManager
from vmm.devices.routing import InterruptRouter
from vmm.machine.ending import Ending
from vmm.machine.vm import Vm
from vmm.machine.vmm import Vmm
from vmm.observe.logger import LOG
from vmm.operations.replacement import Interrupts, Successor
from vmm.placement import Placement, PlacementError

# Values of StartOptions.console (vmm.cli.CONSOLES).
CONSOLE_STDIO = "stdio"
CONSOLE_PTY = "pty"


class Console(NamedTuple):
    """What COM1 is connected with: where output goes, and the descriptor that input comes from (-1: none)."""

    output: ConsoleOutput | None
    source: int

    def close(self) -> None:
        """Release the output of a microVM that is not made after all."""
        if self.output is not None:
            self.output.close()


def open_console(resources: VmResources, plan: LaunchPlan) -> Console:
    """Open a file, standard input and output, a pseudo-terminal, or nothing. Raises VmmError."""
    console = resources.options.console
    limiter = resources.serial.rate_limiter
    bucket = TokenBucket(limiter.size, limiter.refill_time, limiter.one_time_burst or 0) if limiter else None
    descriptor = resources.open_serial_output()
    if descriptor >= 0:
        return Console(ConsoleOutput(descriptor, owned=True, bucket=bucket), 0 if console == CONSOLE_STDIO else -1)
    if console == CONSOLE_PTY:
        return Console(ConsoleOutput(os.dup(plan.console_fd), owned=True, bucket=bucket), plan.console_fd)
    if console == CONSOLE_STDIO:
        return Console(ConsoleOutput(1, owned=False, bucket=bucket), 0)
    return Console(None, -1)


def configuration(
    resources: VmResources, memory: GuestMemory, devices: DeviceManager, boot: BootRegisters, setup: CpuSetup
) -> Configure:
    """Return what a worker is told at its start, without vCPUs."""
    machine = resources.machine_config
    return Configure(
        vcpu_count=machine.vcpu_count,
        smt=machine.smt,
        vcpus=(),
        regions=memory.regions,
        memory_size=memory.size,
        boot=boot,
        ports=devices.ports.windows(),
        mmio=devices.mmio.windows(),
        interrupts=tuple(line.gsi for line in devices.interrupts),
        track_dirty_pages=machine.track_dirty_pages,
        resumes_other=False,
        cpuid=setup.cpuid,
        msr_changes=setup.msr_changes,
        capabilities=setup.capabilities,
    )


class Assembly:
    """The parts of one microVM; ``vmm`` is closed by whoever made this. ``make_successor`` takes a worker's index."""

    def __init__(
        self,
        events: EventManager,
        microvm_id: str,
        memory: GuestMemory,
        placement: Placement,
        console: Console,
        *,
        restarts: bool = False,
    ) -> None:
        self.placement = placement
        self.make_successor: Callable[[int], Worker]
        #: This list is everybody's: a worker that is replaced is replaced here.
        self.workers: list[Worker] = []
        self._memory = memory
        self._output = output = console.output
        self._executors: dict[int, ExitExecutor] = {}
        self._rings: list[ExitExecutor] = []
        self._message: Configure | None = None
        self._ghosts: GhostForwarder | None = None
        self.ending = Ending(_no_tail if output is None else output.tail, restarts=restarts)
        self._router = InterruptRouter(self.workers, self._owner)
        self.devices = DeviceManager(
            transmit=_discard if output is None else output.transmit,
            reset=self.ending.guest_reset,
            set_routes=self._router.set_routes,
            log=LOG.warn,
        )
        console_input = None
        if console.source >= 0:
            console_input = ConsoleInput(console.source, self.devices.serial)
            console_input.set_raw()
        self.vmm = Vmm(
            microvm_id,
            events,
            Vm(memory, placement),
            self.devices,
            self.ending,
            workers=self.workers,
            output=output,
            console_input=console_input,
            make_successor=self._make_successor,
        )

    def _owner(self, apic_id: int) -> int:
        try:
            return self.placement.owner(apic_id)
        except PlacementError:
            return -1

    def attach_devices(self, options: StartOptions, plan: LaunchPlan) -> None:
        """Attach what the command line asks for beside the standard devices."""
        if options.boot_timer:
            start = plan.start_time_us or time.monotonic_ns() // 1000
            # What the parent has used until it forked us is not in our own CPU time.
            self.devices.attach_boot_timer(start, plan.start_time_cpu_us - plan.parent_cpu_time_us)
        if options.exerciser:
            self.devices.attach_exerciser(self.ending.stop)

    # ------------------------------------------------------------ workers

    def prepare(self, configuration: Configure) -> None:
        """Everything is attached: workers get this, and differ in their vCPUs only."""
        self._message = configuration

    def add_worker(self, worker: Worker) -> None:
        """Configure a worker that has said HELLO, in order of their indices: its vCPUs are parked then.

        Raises WorkerError.
        """
        for vcpu in worker.assignment.vcpus:
            self._add_ring(vcpu, worker)
        worker.configure(self._configuration(worker), self.descriptors(worker))
        self.ending.watch(worker)
        self.workers.append(worker)

    def connect(self) -> None:
        """All workers are there: let their ghosts reach the other workers."""
        self._ghosts = GhostForwarder(self.placement, self.workers, self.ending.forwarding_failed)
        self.vmm.attach_ghosts(self._ghosts)

    def _add_ring(self, vcpu: int, worker: Worker) -> None:
        """Make the exit ring of a vCPU, which this worker runs, or whoever replaces it."""

        def failed(text: str) -> None:
            owner = next((each for each in self.workers if each.index == worker.index), worker)
            owner.breach(f"exit ring: {text}")

        executor = self._executors[vcpu] = ExitExecutor(
            self.devices.ports,
            self.devices.mmio,
            before_batch=self.devices.begin_batch,
            after_batch=self._after_exits,
            failed=failed,
            rings=self._rings,
            acknowledge=self.devices.external_interrupt.acknowledge if vcpu == 0 else _nothing_to_acknowledge,
        )
        self.vmm.attach_executor(vcpu, executor)

    def _after_exits(self) -> None:
        """A batch of exits was executed: deliver interrupts, then write what the guest has sent to its UART."""
        self.devices.end_batch()
        if self._output is not None:
            self._output.flush()

    def _configuration(self, worker: Worker) -> Configure:
        assert self._message is not None
        return self._message._replace(vcpus=worker.assignment.vcpus)

    def descriptors(self, worker: Worker) -> WorkerDescriptors:
        """Return the descriptors that a worker with this assignment gets."""
        executors = [(vcpu, self._executors[vcpu]) for vcpu in worker.assignment.vcpus]
        return WorkerDescriptors(
            guest_memory=self._memory.descriptor,
            memory_size=self._memory.size,
            device_page=self.devices.page_descriptor,
            rings=tuple(
                (vcpu, executor.descriptor, executor.doorbell, executor.completion) for vcpu, executor in executors
            ),
            interrupts=tuple((line.gsi, line.eventfd) for line in self.devices.interrupts),
            external_interrupt=self.devices.external_interrupt.eventfd if 0 in worker.assignment.vcpus else -1,
        )

    def _make_successor(self, predecessor: Worker) -> Successor:
        """Return what is needed to let a worker go on for another one."""
        vcpus = predecessor.assignment.vcpus

        def interrupts() -> Interrupts:
            placed = self._router.placed(predecessor.index)
            routes = [route for route in self.devices.ioapic.routes() if route.gsi in placed]
            return Interrupts(routes, self._ghosts.paths_to(vcpus) if self._ghosts is not None else ())

        worker = self.make_successor(predecessor.index)
        return Successor(worker, self._configuration(predecessor), self.descriptors(predecessor), interrupts)


def _nothing_to_acknowledge() -> int:
    """The 8259s are wired to vCPU 0 alone."""
    return 0


def _discard(byte: int) -> None:
    pass


def _no_tail(length: int) -> bytes:
    return b""
