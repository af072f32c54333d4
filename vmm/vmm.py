"""The running microVM as one object: ``Vmm`` has the operations, one method each."""

from __future__ import annotations

import time

from ipc import exit_codes
from ipc.exit_ring import COUNTER_EXITS
from ipc.messages import (
    CellEnded,
    DumpCpuConfig,
    DumpedCpuConfig,
    GhostRecovered,
    GhostsReported,
    Pause,
    ReportGhosts,
    Resume,
    SavedState,
    SaveState,
    VcpuExited,
)
from ipc.plain import signal_name
from ipc.typed import TYPE_CHECKING, Any, Sequence
from vmm.black_box import describe_run_page
from vmm.console import ConsoleInput, ConsoleOutput
from vmm.devices.manager import DeviceManager
from vmm.errors import DeviceError, StateError, VmmError, WorkerError
from vmm.event_manager import EventManager, EventOps, Events
from vmm.events import EVENTS
from vmm.exits import ExitExecutor
from vmm.ghosts import GhostForwarder
from vmm.logger import LOG
from vmm.memory import GuestMemory
from vmm.metrics import METRICS, SIGNAL_KEYS
from vmm.metrics_sources import read_devices, read_exits
from vmm.microvm import InstanceInfo, Microvm
from vmm.placement import Placement
from vmm.rest import read_rest
from vmm.state import VERSION as STATE_VERSION
from vmm.state import MicrovmState, WorkerAtRest
from vmm.version import APP_NAME, FIRECRACKER_VERSION
from vmm.vm import Kvm, Vm
from vmm.workers import SECOND_NS, Worker

if TYPE_CHECKING:
    from vmm.api.text import JsonValue

STATE_NOT_STARTED = "Not started"
STATE_RUNNING = "Running"
STATE_PAUSED = "Paused"

#: VcpuExited.reason of a triple fault, by which guests reset their machine, too.
VCPU_SHUTDOWN = "shutdown"

#: A worker that answers no ping for this long is reported as stalled; a dead one is known at once by its pidfd.
HEARTBEAT_INTERVAL_NS = 1 * SECOND_NS
STALL_AFTER_NS = 3 * SECOND_NS
#: After a pause the exits of all vCPUs must have been executed; they are by then but for the last answer's tail.
DRAIN_TIMEOUT_NS = 5 * SECOND_NS
#: How long GET /vcpus waits for a worker's counters.
REPORT_TIMEOUT_NS = 1 * SECOND_NS


class Vmm(Microvm):
    """One microVM that was built. Made by ``vmm.builder``; closed once.

    ``vcpus_handles`` are the workers, ``device_manager`` the devices, ``vm`` memory and placement. Operations that need
    workers run the event loop until the answer is there and raise WorkerError when a worker fails.
    """

    def __init__(
        self,
        microvm_id: str,
        events: EventManager,
        memory: GuestMemory,
        device_manager: DeviceManager,
        placement: Placement,
    ) -> None:
        self._id = microvm_id
        self._events = events
        self.vm = Vm(memory, placement)
        self.device_manager = device_manager
        self.vcpus_handles: list[Worker] = []
        self._executors: dict[int, ExitExecutor] = {}
        self._ghosts: GhostForwarder | None = None
        self._subscriptions: list[int] = []
        self._console_output: ConsoleOutput | None = None
        self._console_input: ConsoleInput | None = None
        self._state = STATE_NOT_STARTED
        self._shutdown_exit_code: int | None = None
        #: A guest that reboots gets a machine that starts anew (``restart_wanted``), which is for the owner to do.
        self.restarts = False
        self.restart_wanted = False
        self._last_pong: dict[int, int] = {}
        self._last_beat = 0
        self._stalled: set[int] = set()
        self._closed = False

    def __repr__(self) -> str:
        workers = ", ".join(f"vcpu {worker.index}: {worker.state.value}" for worker in self.vcpus_handles)
        return f"<Vmm {self._id} {self._state.lower()} [{workers}]>"

    # ------------------------------------------------------------ construction (vmm.builder)

    def attach_worker(self, worker: Worker) -> None:
        """Take a configured worker over."""
        worker.on_vcpu_exited = self._vcpu_exited
        worker.on_failed = self._worker_failed
        worker.on_ended = self._worker_ended
        self.vcpus_handles.append(worker)

    def attach_executor(self, vcpu: int, executor: ExitExecutor) -> None:
        """Serve the exits of one vCPU."""
        self._executors[vcpu] = executor
        self._subscriptions.append(self._events.add_subscriber(executor))

    def attach_ghosts(self, ghosts: GhostForwarder) -> None:
        """Serve the ghosts of all workers."""
        self._ghosts = ghosts
        for worker in self.vcpus_handles:
            worker.on_ghost_event = ghosts.handle
            worker.on_ghost_recovered = self._ghost_recovered

    def attach_console(self, output: ConsoleOutput | None, console_input: ConsoleInput | None) -> None:
        """Connect the UART with the host."""
        self._console_output = output
        self._console_input = console_input
        if output is not None:
            self._subscriptions.append(self._events.add_subscriber(output))
        if console_input is not None:
            self._subscriptions.append(self._events.add_subscriber(console_input))

    def before_exits(self) -> None:
        """A batch of exits is about to be executed."""
        self.device_manager.hold_interrupts()

    def after_exits(self) -> None:
        """A batch of exits was executed: deliver interrupts, then write what the guest has sent to its UART."""
        self.device_manager.release_interrupts()
        self.flush_console()

    def flush_console(self) -> None:
        """Write what the guest has sent to its UART."""
        if self._console_output is not None:
            self._console_output.flush()

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
        return self._shutdown_exit_code

    def clear_shutdown_exit_code(self) -> None:
        """Forget the stored exit code."""
        self._shutdown_exit_code = None

    def exit_counters(self) -> dict[int, tuple[int, ...]]:
        """Return each vCPU's exit counters, in the order of ``ipc.exit_ring.COUNTER_NAMES``."""
        return {vcpu: executor.counters() for vcpu, executor in sorted(self._executors.items())}

    def vcpu_report(self) -> list[JsonValue]:
        """Return what GET /vcpus shows: one record per vCPU, in order of their indices.

        ``exits`` are those that were answered until the last heartbeat. ``ghosts`` are those of the vCPU's worker
        (its other vCPUs show the same); null if the worker does not answer. ``clock_ahead_ns`` is how far the worker's
        kvmclock was ahead of worker 0's when it was set; null with one vCPU, or where the host cannot tell.
        """
        ghosts = self._ghost_counters()
        return [
            {
                "index": vcpu,
                "worker": worker.index,
                "pid": worker.pid,
                "placement": self.vm.placement.kind,
                "state": "stalled" if worker.index in self._stalled else worker.state.value,
                "exits": self._executors[vcpu].counters()[COUNTER_EXITS],
                "clock_ahead_ns": worker.clock_ahead_ns,
                "ghosts": ghosts.get(worker.index),
            }
            for vcpu, worker in self._by_vcpu()
        ]

    def _ghost_counters(self) -> dict[int, JsonValue]:
        """Ask every worker for the counters of its ghosts; one that does not answer soon is left out."""
        counters: dict[int, JsonValue] = {}
        asked = 0
        for worker in self.vcpus_handles:
            if not worker.assignment.ghosts:
                counters[worker.index] = []
                continue

            def answered(reply: Any, index: int = worker.index) -> None:
                if isinstance(reply, GhostsReported):
                    counters[index] = [each._asdict() for each in reply.ghosts]

            try:
                worker.submit(ReportGhosts(), answered)
                asked += 1
            except VmmError:
                pass  # it has failed or ended, which its state says
        wanted = len(counters) + asked
        self._events.run_until(lambda: len(counters) >= wanted, time.monotonic_ns() + REPORT_TIMEOUT_NS)
        return dict(counters)  # an answer that comes too late changes nothing any more

    def read_metrics(self) -> None:
        """Bring the metrics up to date with what the parts of this microVM have counted."""
        if not self._closed:
            self._read_metrics()

    def _read_metrics(self) -> None:
        read_exits(METRICS, tuple(self.exit_counters().values()))
        read_devices(METRICS, self.device_manager.i8042, self.device_manager.serial, self._console_output)

    # ------------------------------------------------------------ operations

    def _set_state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            EVENTS.emit("microvm-state", state=state)

    def start_vcpus(self) -> None:
        """Begin with every vCPU parked, as InstanceStart does before it resumes. The state becomes Paused."""
        self._set_state(STATE_PAUSED)
        self._subscriptions.append(self._events.add_subscriber(self))

    def resume_vm(self) -> None:
        """Let all vCPUs run (PATCH /vm Resumed). Idempotent. Raises WorkerError, StateError after the end."""
        self._require_alive()
        pending = [(worker, worker.submit(Resume())) for worker in self.vcpus_handles]
        for worker, sequence in pending:
            worker.collect_resume(sequence)
        self._set_state(STATE_RUNNING)

    def pause_vm(self) -> None:
        """Park all vCPUs at an instruction boundary, their exits executed (PATCH /vm Paused). Idempotent."""
        self._require_alive()
        pending = [(worker, worker.submit(Pause())) for worker in self.vcpus_handles]
        for worker, sequence in pending:
            METRICS["vcpu"].add("kvmclock_ctrl_fails", worker.collect_pause(sequence))

        def drained() -> bool:
            return self._shutdown_exit_code is not None or all(executor.idle for executor in self._executors.values())

        if not self._events.run_until(drained, time.monotonic_ns() + DRAIN_TIMEOUT_NS):
            for vcpu, worker in self._by_vcpu():
                if not self._executors[vcpu].idle:
                    worker.breach("it says that it is paused and has exits open")
            raise WorkerError("The exits of the paused vCPUs were not executed in time.")
        self._park_ghosts()
        self._require_alive()
        self._set_state(STATE_PAUSED)

    def _park_ghosts(self) -> None:
        """Let what is on its way between workers arrive; afterwards the LAPICs of the real vCPUs hold all of it, and it
        is verified that nothing else does.

        Every vCPU is parked, so nothing new is sent; a worker answers when its ghosts are empty and what they held was
        forwarded, which the controller confirms only when it has arrived.
        """
        if len(self.vcpus_handles) < 2:
            return
        pending = [(worker, worker.park_ghosts()) for worker in self.vcpus_handles]
        for worker, sequence in pending:
            worker.collect_parked_ghosts(sequence)
        self._read_rest()

    def _read_rest(self) -> tuple[WorkerAtRest, ...]:
        open_exits = [
            sum(not self._executors[vcpu].idle for vcpu in worker.assignment.vcpus) for worker in self.vcpus_handles
        ]
        return read_rest(self.vcpus_handles, open_exits)

    def save_state(self) -> MicrovmState:
        """Return the complete, versioned state but for the content of guest memory (PUT /snapshot/create).

        It can be taken repeatedly and changes nothing. Raises StateError unless paused, WorkerError (also if
        anything is on its way between workers).
        """
        self._require_paused("save_state")
        vcpus = tuple([worker.request(SaveState(vcpu), SavedState) for vcpu, worker in self._by_vcpu()])
        memory, placement = self.vm
        devices = self.device_manager.save_state()
        rest = self._read_rest()
        return MicrovmState(STATE_VERSION, self._id, memory.regions, placement.groups, devices, rest, vcpus)

    def dump_cpu_config(self) -> list[DumpedCpuConfig]:
        """Return CPUID and MSRs of every vCPU (no API call). Raises StateError unless paused, WorkerError."""
        self._require_paused("dump_cpu_config")
        return [worker.request(DumpCpuConfig(vcpu), DumpedCpuConfig) for vcpu, worker in self._by_vcpu()]

    def send_ctrl_alt_del(self) -> None:
        """Type Ctrl-Alt-Del on the guest's keyboard (PUT /actions SendCtrlAltDel).

        Raises DeviceError when the guest has not read what was typed before: the buffer has 16 bytes, this takes 4.
        """
        self._require_alive()
        try:
            self.device_manager.i8042.send_ctrl_alt_del()
        except DeviceError as error:
            raise DeviceError(f"I8042 error: {error}") from error

    def stop(self, exit_code: int) -> None:
        """End the microVM: the main loop returns with this code. The first code counts, but 0 yields to an error."""
        if self._shutdown_exit_code is None:
            LOG.info("Vmm is stopping.")
            EVENTS.emit("microvm-stopping", exit_code=exit_code)
        if not self._shutdown_exit_code:
            self._shutdown_exit_code = exit_code

    def guest_reset(self) -> None:
        """The guest has reset the machine."""
        if not self.restarts:
            self.stop(exit_codes.OK)
        elif self._shutdown_exit_code is None:
            self.restart_wanted = True

    def _by_vcpu(self) -> list[tuple[int, Worker]]:
        return sorted((vcpu, worker) for worker in self.vcpus_handles for vcpu in worker.assignment.vcpus)

    def _require_alive(self) -> None:
        if self._shutdown_exit_code is not None:
            raise StateError("The microVM has ended.")

    def _require_paused(self, operation: str) -> None:
        self._require_alive()
        if self._state != STATE_PAUSED:
            raise StateError(f"{operation} needs a paused microVM: save/restore unavailable while running.")

    # ------------------------------------------------------------ what happens to workers

    def _vcpu_exited(self, worker: Worker, event: VcpuExited) -> None:
        text = f"vCPU {event.vcpu} (worker pid {worker.pid}) left its run loop: {event.reason}. {event.text}"
        if self._shutdown_exit_code is not None:
            # A guest that was reset runs on until its worker ends, into a triple fault: that is no news.
            LOG.debug(text)
            return
        if self.restart_wanted or (self.restarts and event.reason == VCPU_SHUTDOWN):
            LOG.debug(text)
            self.guest_reset()
            return
        EVENTS.emit("vcpu-exited", vcpu=event.vcpu, reason=event.reason, exit_code=event.code)
        if event.code:
            METRICS["vcpu"].add("failures")
            LOG.error(text)
            self._report_black_box(worker)
        else:
            LOG.info(text)
        self.stop(event.code)

    def _worker_failed(self, worker: Worker, text: str) -> None:
        LOG.error(text)
        self._report_black_box(worker)
        self.stop(exit_codes.GENERIC_ERROR)

    def _worker_ended(self, worker: Worker, notice: CellEnded) -> None:
        if self._shutdown_exit_code is not None:
            return
        if notice.signal:
            how = f"was ended by signal {signal_name(notice.signal)}"
            code = exit_codes.of_signal(notice.signal)
            if code in SIGNAL_KEYS:
                METRICS["signals"].store(SIGNAL_KEYS[code], 1)
        else:
            how = f"exited with status {notice.status}"
            code = notice.status or exit_codes.GENERIC_ERROR
        wall = f", by its {notice.wall} wall" if notice.wall else ""
        if notice.wall == "seccomp":
            METRICS["seccomp"].add("num_faults")
        LOG.error(f"Worker vcpu {worker.index} (pid {notice.pid}) {how}{wall}.")
        if notice.wall == "seccomp":
            LOG.error(f"Shutting down VM after intercepting a bad syscall of worker vcpu {worker.index}.")
        self._report_black_box(worker)
        self.stop(code)

    def _report_black_box(self, worker: Worker) -> None:
        for vcpu in worker.assignment.vcpus:
            page = worker.run_page(vcpu)
            if page is not None:
                LOG.error(f"vCPU {vcpu}: {describe_run_page(page)}")

    def _ghost_recovered(self, worker: Worker, event: GhostRecovered) -> None:
        text = f"Worker vcpu {worker.index}: {event.text}."
        if not event.fatal:
            LOG.warn(text)
        elif self._shutdown_exit_code is None:
            LOG.error(text)
            self.stop(exit_codes.GENERIC_ERROR)

    def forwarding_failed(self, text: str) -> None:
        """An interrupt between vCPUs was lost: the guest cannot go on."""
        if self._shutdown_exit_code is None:
            LOG.error(text)
            self.stop(exit_codes.GENERIC_ERROR)

    # ------------------------------------------------------------ heartbeat

    def init(self, ops: EventOps) -> None:
        """Subscriber: start the heartbeat."""
        ops.add_timer(time.monotonic_ns() + HEARTBEAT_INTERVAL_NS, lambda: self._beat(ops))

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: workers have subscriptions of their own, here only time is watched; anything else is logged."""
        LOG.error(f"Spurious event {events.event_set:#x} of descriptor {events.fd} for the microVM.")

    def _beat(self, ops: EventOps) -> None:
        now = time.monotonic_ns()
        if now - self._last_beat >= 2 * HEARTBEAT_INTERVAL_NS:
            self._last_pong.clear()  # it was us who did not run: stopped, or a busy host
        self._last_beat = now
        for worker in self.vcpus_handles:
            if worker.alive and self._shutdown_exit_code is None:
                self._beat_worker(worker, now)
        ops.add_timer(now + HEARTBEAT_INTERVAL_NS, lambda: self._beat(ops))

    def _beat_worker(self, worker: Worker, now: int) -> None:
        index = worker.index
        silent = now - self._last_pong.setdefault(index, now)
        if silent >= STALL_AFTER_NS:
            if index not in self._stalled:
                self._stalled.add(index)
                EVENTS.emit("worker-stalled", worker=index)
                text = (
                    f"Worker vcpu {index} (pid {worker.pid}) is alive but has not answered for {silent // SECOND_NS} s."
                )
                LOG.warn(text)
            return  # one unanswered ping is enough: its queue is bounded
        try:
            worker.ping(lambda: self._pong(index))
        except VmmError:
            pass  # the worker's end is reported by itself

    def _pong(self, index: int) -> None:
        self._last_pong[index] = time.monotonic_ns()
        if index in self._stalled:
            self._stalled.discard(index)
            EVENTS.emit("worker-answers", worker=index)
            LOG.info(f"Worker vcpu {index} answers again.")

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """End the workers in order, write the last console output, release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.restart_wanted and self._shutdown_exit_code is None:
            self._shutdown_exit_code = exit_codes.OK  # that its workers end now is no news
        try:
            end_workers(self.vcpus_handles)
            for executor in self._executors.values():
                executor.drain()
            self.flush_console()
            self._read_metrics()
        finally:
            self._release()

    def _release(self) -> None:
        for subscription in self._subscriptions:
            self._events.remove_subscriber(subscription)
        for worker in self.vcpus_handles:
            worker.close()
        for executor in self._executors.values():
            executor.close()
        if self._ghosts is not None:
            self._ghosts.close()
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


def end_workers(workers: Sequence[Worker]) -> None:
    """Ask all workers to finish, then wait for each; what does not end is killed."""
    for worker in workers:
        worker.finish()
    for worker in workers:
        worker.wait_ended()


__all__ = ["DeviceError", "InstanceInfo", "Vmm", "end_workers"]
