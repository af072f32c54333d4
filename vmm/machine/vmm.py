"""The running microVM as one object: ``Vmm`` has the operations, one method each."""

from __future__ import annotations

from base import exit_codes
from base.event_manager import EventManager, EventOps, Events
from base.lean_typing import TYPE_CHECKING, Callable, Sequence
from base.version import APP_NAME, FIRECRACKER_VERSION
from ipc.messages.worker import DumpCpuConfig, DumpedCpuConfig, SavedState, SaveState
from vmm.cells.exits import ExitExecutor, read_exits
from vmm.cells.ghosts import GhostForwarder
from vmm.cells.heartbeat import Heartbeat
from vmm.cells.pool import end_workers
from vmm.cells.vms import WorkerVms
from vmm.cells.worker import Kvm, Worker
from vmm.devices.legacy.console import ConsoleInput, ConsoleOutput
from vmm.devices.manager import DeviceManager, read_devices
from vmm.errors import DeviceError, MicrovmEndedError, StateError, VmmError, WorkerError
from vmm.machine.device_operations import DeviceOperations
from vmm.machine.ending import Ending
from vmm.machine.post_mortem import Failure
from vmm.machine.report import InstanceInfo, vcpu_report
from vmm.machine.vm import Vm
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG
from vmm.observe.metrics import METRICS
from vmm.operations import pause
from vmm.operations.driver import Operation, OperationDriver
from vmm.operations.quiescence import QuiescentWorker, read_quiescence
from vmm.operations.replacement import Replacements, Successor
from vmm.snapshot.microvm_state import MachineState, MicrovmState, of_devices

if TYPE_CHECKING:
    from vmm.cells.device import CellDevice, Update
    from vmm.cells.device_pool import DeviceCells
    from vmm.json.text import JsonValue
    from vmm.machine.device_report import VirtioMetrics

STATE_NOT_STARTED = "Not started"
STATE_RUNNING = "Running"
STATE_PAUSED = "Paused"


class Vmm(DeviceOperations):
    """One microVM that was built. Made by ``vmm.machine.builder``; closed once.

    ``vcpus_handles`` are the workers, ``device_manager`` the devices, ``vm`` memory and placement. Operations that need
    workers run the event loop until the answer is there and raise WorkerError when a worker fails.
    """

    def __init__(
        self,
        microvm_id: str,
        events: EventManager,
        vm: Vm,
        device_manager: DeviceManager,
        ending: Ending,
        *,
        vms: WorkerVms,
        workers: list[Worker],
        output: ConsoleOutput | None,
        console_input: ConsoleInput | None,
        make_successor: Callable[[Worker], Successor],
    ) -> None:
        self._id = microvm_id
        self._events = events
        self.vm = vm
        self.device_manager = device_manager
        self.ending = ending
        self._vms = vms
        self.vcpus_handles = workers
        self._executors: dict[int, ExitExecutor] = {}
        self._ghosts: GhostForwarder | None = None
        self._console_output = output
        self._console_input = console_input
        consoles = [each for each in (output, console_input) if each is not None]
        self._subscriptions = [events.add_subscriber(each) for each in consoles]
        self._state = STATE_NOT_STARTED
        self._closed = False
        self._driver = OperationDriver(self, events)
        ending.on_lost = self._driver.lost
        self.replacements = Replacements(self, self._driver, events, make_successor)
        #: Where the virtio devices are; None for a machine without any.
        self.device_cells: DeviceCells | None = None
        self._virtio_metrics: VirtioMetrics | None = None
        self._heartbeat = Heartbeat(workers, self.has_ended, self._pong)

    def __repr__(self) -> str:
        workers = ", ".join(f"vcpu {worker.index}: {worker.state.value}" for worker in self.vcpus_handles)
        return f"<Vmm {self._id} {self._state.lower()} [{workers}]>"

    # ------------------------------------------------------------ construction (vmm.machine.assembly)

    def attach_executor(self, vcpu: int, executor: ExitExecutor) -> None:
        """Serve the exits of one vCPU."""
        self._executors[vcpu] = executor
        self._subscriptions.append(self._events.add_subscriber(executor))

    def attach_ghosts(self, ghosts: GhostForwarder) -> None:
        """Serve the ghosts of all workers."""
        self._ghosts = ghosts
        for worker in self.vcpus_handles:
            worker.on_ghost_event = ghosts.handle

    # ------------------------------------------------------------ information

    def version(self) -> str:
        """Return the version that clients of Firecracker expect (GET /version)."""
        return FIRECRACKER_VERSION

    @property
    def instance_info(self) -> InstanceInfo:
        """Id, state, version and application name (GET /)."""
        return InstanceInfo(self._id, self._state, FIRECRACKER_VERSION, APP_NAME)

    def kvm(self) -> Kvm:
        """Return what the host's KVM can do, as the first worker found it. Raises StateError without a worker."""
        if not self.vcpus_handles:
            raise StateError("There is no worker yet that could say what the host's KVM can do.")
        return self.vcpus_handles[0].kvm

    def shutdown_exit_code(self) -> int | None:
        """Return the exit code once the microVM has been stopped, else None."""
        return self.ending.exit_code

    def clear_shutdown_exit_code(self) -> None:
        """Forget the stored exit code."""
        self.ending.exit_code = None

    @property
    def failure(self) -> Failure | None:
        """Why the microVM failed, if it did."""
        return self.ending.failure

    @property
    def restart_wanted(self) -> bool:
        """Is the guest to get a machine that starts anew?"""
        return self.ending.restart_wanted

    def exit_counters(self) -> dict[int, tuple[int, ...]]:
        """Return each vCPU's exit counters, in the order of ``ipc.exit_ring.COUNTER_NAMES``."""
        return {vcpu: executor.counters() for vcpu, executor in sorted(self._executors.items())}

    def vcpu_report(self) -> list[JsonValue]:
        """Return what GET /vcpus shows: one record per vCPU, in order of their indices (vmm.machine.report)."""
        return vcpu_report(
            self._by_vcpu(), self.vm.placement, self._executors, self._heartbeat.is_stalled, self.replacements.count
        )

    def device_report(self) -> list[JsonValue]:
        """Return what GET /devices shows: one record per virtio device, in the order of their addresses."""
        if self.device_cells is None:
            return []
        self.device_cells.collect()
        from vmm.machine.device_report import device_report

        return device_report(self.device_manager.virtio, self.device_cells)

    def read_metrics(self) -> None:
        """Bring the metrics up to date with what the parts of this microVM have counted."""
        if not self._closed:
            self._read_metrics()

    def _read_metrics(self) -> None:
        read_exits(METRICS, tuple(self.exit_counters().values()))
        if self.device_cells is not None:
            from vmm.machine.device_report import VirtioMetrics

            self._virtio_metrics = self._virtio_metrics or VirtioMetrics(METRICS, self.device_manager.virtio)
            self.device_cells.collect()
            self._virtio_metrics.read()
        read_devices(METRICS, self.device_manager.i8042, self.device_manager.serial, self._console_output)

    # ------------------------------------------------------------ operations

    def _set_state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            EVENTS.emit("microvm-state", state=state)

    def start_vcpus(self) -> None:
        """Begin with every vCPU parked, as InstanceStart does before it resumes. The state becomes Paused."""
        self._driver.begin()
        self._set_state(STATE_PAUSED)
        self._subscriptions += [
            self._events.add_subscriber(each) for each in (self, self._heartbeat, self.device_manager.timer)
        ]

    def resume_vm(self) -> None:
        """Let all vCPUs run (PATCH /vm Resumed). Idempotent. Raises WorkerError, StateError after the end.

        If a worker does not answer, all run all the same: that one as soon as it can.
        """
        if self.device_cells is not None:
            self.device_cells.resume()
        try:
            self.perform(pause.resuming(self))
        except MicrovmEndedError as error:
            LOG.debug(str(error))  # the guest has run, and has ended before the last worker could say so
        self._set_state(STATE_RUNNING)  # also if it has ended: one that starts anew goes on as what it was

    def pause_vm(self) -> None:
        """Park all vCPUs at an instruction boundary, their exits executed, and stop the devices (PATCH /vm Paused).

        Idempotent. If a worker does not answer, or a device does not get ready, all go on running. Raises WorkerError,
        DeviceError, StateError.
        """
        self.perform(pause.pausing(self))
        self.require_alive()
        if self.device_cells is not None:
            try:
                self.device_cells.stop()
            except DeviceError:
                self.resume_vm()
                raise

    def perform(self, operation: Operation) -> None:
        """Carry an operation over all workers out. Raises as ``OperationDriver.perform`` does."""
        self.require_alive()
        try:
            self._driver.perform(operation)
        finally:
            if not self.has_ended():
                self._set_state(self._driver.life.state.value)

    def _pong(self, worker: Worker, says: str) -> None:
        """A worker says how it is: one that has missed that it should run is told again."""
        if worker in self.vcpus_handles and self._driver.life.must_resume(says):
            pause.resume(worker, lambda refusal: None)

    def replace_vcpu(self, vcpu: int) -> None:
        """Let a freshly forked worker go on for the one that runs this vCPU (PATCH /vcpus/{i} Replace).

        Raises StateError (nothing has changed) or WorkerError (the old worker goes on, or, with a new one, all run as
        soon as those that stand still can).
        """
        self.require_alive()
        owner = next((worker for index, worker in self._by_vcpu() if index == vcpu), None)
        if owner is None:
            raise StateError(f"There is no vCPU {vcpu}.")
        self.replacements.replace(owner)

    def replace_vcpus(self) -> None:
        """Replace all workers, one after the other (PATCH /vcpus Replace). Raises as :meth:`replace_vcpu`."""
        self.require_alive()
        count = len(self.vcpus_handles)
        for index in range(count):
            try:
                self.replacements.replace(self.vcpus_handles[index])
            except VmmError as error:
                if not index:
                    raise
                raise WorkerError(f"After {index} of {count} workers: {error}") from error

    # ------------------------------------------------------------ what operations need (vmm.operations)

    def drained(self) -> bool:
        """Have all exits of the parked vCPUs been executed?"""
        return all(executor.idle for executor in self._executors.values())

    def not_drained(self) -> None:
        """Whoever has an exit open although it says that it is parked broke the protocol."""
        for vcpu, worker in self._by_vcpu():
            if not self._executors[vcpu].idle:
                worker.breach("it says that it is paused and has exits open")

    def has_ended(self) -> bool:
        """Has the microVM ended, or is it about to, or to start anew?"""
        return self.ending.has_come

    def require_alive(self) -> None:
        """Raise StateError after the end."""
        self.ending.require_alive()

    def cannot_go_on(self, text: str) -> None:
        """An operation could be neither completed nor rolled back."""
        self.ending.cannot_go_on(text)

    def clock_failed(self, count: int) -> None:
        """So many vCPUs could not be told that they were stopped."""
        METRICS["vcpu"].add("kvmclock_ctrl_fails", count)

    def exchange_worker(self, predecessor: Worker, successor: Worker) -> None:
        """The successor runs the predecessor's vCPUs from now on."""
        self.vcpus_handles[self.vcpus_handles.index(predecessor)] = successor
        predecessor.replaced()
        self.ending.watch(successor)
        if self._ghosts is not None:
            successor.on_ghost_event = self._ghosts.handle
        self._vms.forget_sources(predecessor.index)

    def _read_quiescence(self) -> tuple[QuiescentWorker, ...]:
        open_exits = [
            sum(not self._executors[vcpu].idle for vcpu in worker.assignment.vcpus) for worker in self.vcpus_handles
        ]
        return read_quiescence(self.vcpus_handles, open_exits)

    def save_state(self) -> MicrovmState:
        """Return the complete, versioned state but for the content of guest memory (PUT /snapshot/create).

        It can be taken repeatedly and changes nothing. Raises StateError unless paused, WorkerError (also if
        anything is on its way between workers).
        """
        self._require_paused("save_state")
        vcpus = tuple([worker.request(SaveState(vcpu), SavedState) for vcpu, worker in self._by_vcpu()])
        memory, placement = self.vm
        devices = of_devices(self.device_manager.units)
        machine = MachineState(self._id, memory.regions, placement.groups)
        return MicrovmState(machine, devices, self._read_quiescence(), vcpus)

    def dump_cpu_config(self) -> list[DumpedCpuConfig]:
        """Return CPUID and MSRs of every vCPU (no API call). Raises StateError unless paused, WorkerError."""
        self._require_paused("dump_cpu_config")
        return [worker.request(DumpCpuConfig(vcpu), DumpedCpuConfig) for vcpu, worker in self._by_vcpu()]

    def block_device(self, drive_id: str) -> CellDevice | None:
        """Return the block device with this id."""
        if self.device_cells is None:
            return None
        from virtio.abi import VIRTIO_ID_BLOCK  # carried (jailer.carried): there are devices, so it is loaded

        found = [each for each in self._cell_devices() if each.kind == VIRTIO_ID_BLOCK and each.id == drive_id]
        return found[0] if found else None

    def _cell_devices(self) -> Sequence[CellDevice]:
        return () if self.device_cells is None else self.device_cells.devices

    def put_into_force(self, update: Update) -> None:
        """Wait for a change of a device. Raises DeviceError if it was refused, StateError after the end."""
        assert self.device_cells is not None
        self.device_cells.wait_for(update)
        if update.refusal:
            raise DeviceError(update.refusal)

    def send_ctrl_alt_del(self) -> None:
        """Type Ctrl-Alt-Del on the guest's keyboard (PUT /actions SendCtrlAltDel).

        Raises DeviceError when the guest has not read what was typed before: the buffer has 16 bytes, this takes 4.
        """
        self.require_alive()
        try:
            self.device_manager.i8042.send_ctrl_alt_del()
        except DeviceError as error:
            raise DeviceError(f"I8042 error: {error}") from error

    def stop(self, exit_code: int) -> None:
        """End the microVM: the main loop returns with this code. The first code counts, but 0 yields to an error."""
        self.ending.stop(exit_code)

    def _by_vcpu(self) -> list[tuple[int, Worker]]:
        return sorted((vcpu, worker) for worker in self.vcpus_handles for vcpu in worker.assignment.vcpus)

    def _require_paused(self, operation: str) -> None:
        self.require_alive()
        if self._state != STATE_PAUSED:
            raise StateError(f"{operation} needs a paused microVM: save/restore unavailable while running.")

    def init(self, ops: EventOps) -> None:
        """Subscriber: there are deadlines to be armed."""
        self.replacements.ops = ops

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: workers have subscriptions of their own, here only time is watched; anything else is logged."""
        LOG.error(f"Spurious event {events.event_set:#x} of descriptor {events.fd} for the microVM.")

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """End the workers in order, write the last console output, release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.restart_wanted and self.ending.exit_code is None:
            self.ending.exit_code = exit_codes.OK  # that its workers end now is no news
        try:
            end_workers([*self.vcpus_handles, *self.replacements.retired])
            if self.device_cells is not None:
                self.device_cells.collect()
                self.device_cells.end()
            for executor in self._executors.values():
                executor.drain()
            if self._console_output is not None:
                self._console_output.flush()
            self._read_metrics()
        finally:
            self._release()

    def _release(self) -> None:
        for subscription in self._subscriptions:
            self._events.remove_subscriber(subscription)
        for worker in [*self.vcpus_handles, *self.replacements.retired]:
            worker.close()
        for executor in self._executors.values():
            executor.close()
        self._vms.close()
        if self._console_input is not None:
            self._console_input.close()
        if self._console_output is not None:
            self._console_output.close()
        self.device_manager.close()
        self.vm.memory.close()

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["DeviceError", "Vmm"]
