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
from vmm.cells.vms import WorkerVms
from vmm.cells.worker import Worker, WorkerDescriptors
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.cpu_config.setup import CpuSetup
from vmm.devices.legacy.console import ConsoleInput, ConsoleOutput
from vmm.devices.manager import DeviceManager
from vmm.machine.ending import Ending
from vmm.machine.vm import Vm
from vmm.machine.vmm import Vmm
from vmm.observe.logger import LOG
from vmm.operations.replacement import Successor
from vmm.placement import Placement

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


def configuration(resources: VmResources, boot: BootRegisters, setup: CpuSetup) -> Configure:
    """Return what a worker is told at its start, without vCPUs."""
    machine = resources.machine_config
    return Configure(
        vcpu_count=machine.vcpu_count,
        smt=machine.smt,
        vcpus=(),
        boot=boot,
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
        vms: WorkerVms,
        *,
        console: Console,
        restarts: bool = False,
    ) -> None:
        self.placement = placement
        self.make_successor: Callable[[int], Worker]
        #: This list is everybody's: a worker that is replaced is replaced here.
        self.workers = vms.workers
        self._output = output = console.output
        self._executors: dict[int, ExitExecutor] = {}
        self._rings: list[ExitExecutor] = []
        self._message: Configure | None = None
        self.ending = Ending(_no_tail if output is None else output.tail, restarts=restarts)
        self.vms = vms
        self.devices = DeviceManager(
            transmit=_discard if output is None else output.transmit,
            reset=self.ending.guest_reset,
            set_routes=self.vms.set_routes,
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
            vms=self.vms,
            workers=self.workers,
            output=output,
            console_input=console_input,
            make_successor=self._make_successor,
        )

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
        """Everything is attached: note what the VMs have, and what workers are told, who differ in their vCPUs only."""
        self.vms.set_windows(self.devices.ports.windows(), self.devices.mmio.windows())
        self.vms.add_interrupts([(line.gsi, line.eventfd) for line in self.devices.interrupts])
        for slot in self.devices.memory_slots():
            self.vms.map_memory(slot)
        for doorbell in self.devices.doorbells():
            self.vms.add_doorbell(doorbell)
        self._message = configuration

    def add_worker(self, worker: Worker) -> None:
        """Configure a worker that has said HELLO, in order of their indices: its vCPUs are parked then.

        Raises WorkerError.
        """
        for vcpu in worker.assignment.vcpus:
            self._add_ring(vcpu, worker)
        worker.configure(self._configuration(worker), self._descriptors(worker), self.vms.everything())
        self.ending.watch(worker)
        self.workers.append(worker)

    def connect(self) -> None:
        """All workers are there: let their ghosts reach the other workers."""
        ghosts = GhostForwarder(self.placement, self.workers, self.vms, self.ending.forwarding_failed)
        self.vmm.attach_ghosts(ghosts)

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

    def _descriptors(self, worker: Worker) -> WorkerDescriptors:
        executors = [(vcpu, self._executors[vcpu]) for vcpu in worker.assignment.vcpus]
        rings = [(vcpu, each.descriptor, each.doorbell, each.completion) for vcpu, each in executors]
        external = self.devices.external_interrupt.eventfd if 0 in worker.assignment.vcpus else -1
        return WorkerDescriptors(self.devices.page_descriptor, rings, external_interrupt=external)

    def _make_successor(self, predecessor: Worker) -> Successor:
        """Return what is needed to let a worker go on for another one."""
        worker = self.make_successor(predecessor.index)
        return Successor(worker, self._configuration(predecessor), self._descriptors(predecessor), self.vms)


def _nothing_to_acknowledge() -> int:
    """The 8259s are wired to vCPU 0 alone."""
    return 0


def _discard(byte: int) -> None:
    pass


def _no_tail(length: int) -> bytes:
    return b""
