"""The ghosts of a worker as its control thread sees them: they run, are parked, and what reaches them is forwarded."""

from __future__ import annotations

import time

from base.lean_typing import Any, Callable, Sequence
from ipc.messages.ghosts import (
    VCPU_STARTING,
    ClockRead,
    ClockSet,
    GhostEvent,
    GhostEventDone,
    GhostRecovered,
    GhostsParked,
    InitVcpu,
    InterruptRaised,
    IpiPathOpen,
    Noted,
    OpenIpiSource,
    OpenIpiTarget,
    ParkGhosts,
    PlaceStub,
    QuiescenceRead,
    RaiseInterrupt,
    ReadClock,
    ReadQuiescence,
    SetClock,
    StartVcpu,
    StubPlaced,
)
from ipc.messages.records import MAX_TEXT
from ipc.messages.replacement import GhostState
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import ConfigurationError, StateError, WorkerError
from vcpu_worker.ghosts.ghost import BUSY, Ghost
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.machine import Machine
from vcpu_worker.replies import Command, Reply, bind, failed, text_of
from vcpu_worker.vcpu_thread import Completions, Done, VcpuThread

#: Events that the controller was told of and has not dealt with. More of them wait here: the channel is bounded.
MAX_OPEN_EVENTS = 16
FIRST_STOP_PAUSE_NS = 1_000_000
LAST_STOP_PAUSE_NS = 64_000_000

Key = tuple[int, int, int]


class Forwarder:
    """What is to be forwarded, each thing at most once at a time. An event that comes again meanwhile is sent again.

    Sans-IO: ``send`` is called with what the controller has to be told.
    """

    def __init__(self, send: Callable[[GhostEvent], object]) -> None:
        self._send = send
        self._open: set[Key] = set()
        #: In order of arrival; the values mean nothing.
        self._waiting: dict[Key, None] = {}

    @property
    def count(self) -> int:
        """How many events the controller has not dealt with."""
        return len(self._open) + len(self._waiting)

    def add(self, event: int, vcpu: int, vector: int) -> None:
        """Something happened."""
        self._waiting[event, vcpu, vector] = None
        self._send_next()

    def done(self, event: int, vcpu: int, vector: int) -> None:
        """The controller has dealt with it."""
        self._open.discard((event, vcpu, vector))
        self._send_next()

    def _send_next(self) -> None:
        for key in [each for each in self._waiting if each not in self._open]:
            if len(self._open) >= MAX_OPEN_EVENTS:
                return
            del self._waiting[key]
            self._open.add(key)
            self._send(GhostEvent(*key))


class GhostRunner:
    """A ghost with its thread and what the control thread knows of it."""

    __slots__ = ("ghost", "placing", "running", "thread", "when_stopped")

    def __init__(self, ghost: Ghost, thread: VcpuThread) -> None:
        self.ghost = ghost
        self.thread = thread
        self.running = False
        #: It was running and is being made the stub: it is not quiescent, although it does not run.
        self.placing = False
        self.when_stopped: list[Callable[[], None]] = []

    def stop(self) -> None:
        """Ask the ghost to leave KVM_RUN and interrupt it."""
        self.ghost.ask_to_stop()
        self.thread.kick()


class GhostControl:
    """Serves the commands that concern ghosts. All methods are for the control thread.

    ``threads`` are those of the machine's vCPUs, then of its ghosts. ``ghost_failed``: one cannot go on.
    """

    def __init__(
        self,
        machine: Machine,
        threads: list[VcpuThread],
        completions: Completions,
        descriptors: DescriptorSet,
        *,
        send: Callable[[Any], object],
        ghost_failed: Callable[[int, str], None],
    ) -> None:
        self._machine = machine
        self._threads = threads
        self._completions = completions
        self._descriptors = descriptors
        self._send = send
        self._ghost_failed = ghost_failed
        self._forwarder = Forwarder(send)
        #: What ghosts' threads have told and this thread has not taken yet: so that no flood makes the queue long.
        self._told: set[Key] = set()
        self._runners: dict[int, GhostRunner] = {}
        ghost_threads = threads[len(machine.vcpus) :]
        for kvm, thread in zip(machine.ghost_vcpus, ghost_threads, strict=True):
            ghost = Ghost(kvm, self._reported, self._recovered, single_step=machine.single_step)
            self._runners[kvm.index] = GhostRunner(ghost, thread)
        self._parking: list[Reply] = []
        self._drained = 0
        self._stop_pause_ns = FIRST_STOP_PAUSE_NS
        #: When ghosts that hold something are to be stopped again (CLOCK_MONOTONIC), 0: not at all.
        self.due_ns = 0
        #: Called when the controller has dealt with an event of one of our own vCPUs.
        self.on_own_event_done: Callable[[int], None] = lambda vcpu: None
        self.commands: dict[type[Any], Command] = {
            GhostEventDone: self._event_done,
            PlaceStub: self._place_stub,
            StartVcpu: self._start_vcpu,
            InitVcpu: self._init_vcpu,
            RaiseInterrupt: self._raise_interrupt,
            OpenIpiTarget: self._open_target,
            OpenIpiSource: self._open_source,
            ParkGhosts: self._park,
            ReadQuiescence: self._read_quiescence,
            ReadClock: self._read_clock,
            SetClock: self._set_clock,
        }

    # ------------------------------------------------------------ events of ghosts

    def _reported(self, event: int, vcpu: int, vector: int) -> None:
        """A ghost's thread tells of something."""
        key = (event, vcpu, vector)
        if key not in self._told:
            self._told.add(key)
            self._completions.put(self._forward, key)

    def _forward(self, key: Key) -> None:
        self._told.discard(key)  # before it is sent: what comes from now on is news
        self._forwarder.add(*key)

    def _recovered(self, vcpu: int, text: str) -> None:
        """A ghost's thread put it back into its stub."""
        self._completions.put(self._tell_recovery, (vcpu, text))

    def _tell_recovery(self, told: tuple[int, str]) -> None:
        self._send(GhostRecovered(told[0], False, told[1][:MAX_TEXT]))

    def add_event(self, event: int, vcpu: int) -> None:
        """Tell the controller of something that happened to a vCPU of our own."""
        self._forwarder.add(event, vcpu, 0)

    def _event_done(self, command: GhostEventDone, reply: Reply) -> None:
        self._forwarder.done(*command)
        if command.event == VCPU_STARTING:
            self.on_own_event_done(command.vcpu)
        reply(Noted())
        self._check_parked()

    # ------------------------------------------------------------ configuration, running, parking

    def configure(self, configure: Callable[[KvmVcpu], None], done: Done) -> int:
        """Configure every ghost; ``done`` is called once for each. Returns how many there are."""
        for runner in self._runners.values():
            runner.thread.submit(bind(runner.ghost.configure, configure), done)
        return len(self._runners)

    def publish(self) -> None:
        """Let every ghost count where the controller sees it: in the ring of the worker's first vCPU. None may run."""
        ring = self._machine.vcpus[0].ring
        assert ring is not None
        for vcpu, runner in self._runners.items():
            runner.ghost.count_in(ring.ghost_counters(vcpu))

    def place_first(self, done: Done) -> bool:
        """Make the ghost of vCPU 0, which runs from the beginning, the stub. False: it is no ghost here."""
        runner = self._runners.get(0)
        if runner is None:
            return False
        runner.thread.submit(runner.ghost.place_stub, done)
        return True

    def run(self) -> None:
        """Let every ghost run."""
        self.due_ns = 0
        for runner in self._runners.values():
            if not runner.running:
                self._run(runner)

    def _run(self, runner: GhostRunner) -> None:
        runner.running = True
        runner.ghost.allow_to_run()
        runner.thread.submit(runner.ghost.run, bind(self._stopped, runner))

    def _stopped(self, runner: GhostRunner, result: Any) -> None:
        runner.running = False
        if isinstance(result, Exception):
            text = text_of(result)
            self._send(GhostRecovered(runner.ghost.index, True, text))
            self._ghost_failed(runner.ghost.index, text)
            return
        if runner.when_stopped:
            actions, runner.when_stopped = runner.when_stopped, []
            for action in actions:
                action()
        elif self._parking and result != BUSY:
            self._check_parked()
        else:  # what it holds has to leave it first
            self._drained += bool(self._parking)
            self._run(runner)

    def _park(self, command: ParkGhosts, reply: Reply) -> None:
        if not self._parking:
            self._drained = 0
            self._stop_pause_ns = FIRST_STOP_PAUSE_NS
        self._parking.append(reply)
        self._stop_all()
        self._check_parked()

    def _stop_all(self) -> None:
        self.due_ns = time.monotonic_ns() + self._stop_pause_ns
        for runner in self._runners.values():
            if runner.running:
                runner.stop()

    def stop_again_if_due(self) -> None:
        """Stop what was running on because it held something."""
        if self._parking and time.monotonic_ns() >= self.due_ns:
            self._stop_pause_ns = min(2 * self._stop_pause_ns, LAST_STOP_PAUSE_NS)
            self._stop_all()

    def _check_parked(self) -> None:
        if not self._parking or self._forwarder.count:
            return
        if any(each.running or each.placing for each in self._runners.values()):
            return
        self.due_ns = 0
        waiting, self._parking = self._parking, []
        for reply in waiting:
            reply(GhostsParked(self._drained))

    def _read_quiescence(self, command: ReadQuiescence, reply: Reply) -> None:
        """Each ghost's thread reads what the ghost holds."""
        if any(runner.running for runner in self._runners.values()):
            raise StateError("ghosts are running: park them first")
        found: list[Any] = []

        def read(result: Any) -> None:
            found.append(result)
            if len(found) == len(self._runners):
                answer()

        def answer() -> None:
            failures = [each for each in found if isinstance(each, Exception)]
            reply(failed(failures[0]) if failures else QuiescenceRead(self._forwarder.count, tuple(sorted(found))))

        for runner in self._runners.values():
            runner.thread.submit(runner.ghost.quiescence, read)
        if not self._runners:
            answer()

    # ------------------------------------------------------------ starting vCPUs, interrupts

    def _place_stub(self, command: PlaceStub, reply: Reply) -> None:
        runner = self._runners.get(command.vcpu)
        if runner is None:
            raise ConfigurationError(f"vCPU {command.vcpu} is no ghost of this worker")
        if runner.ghost.is_stub:
            reply(StubPlaced())
            return
        was_running = runner.running

        def placed(result: Any) -> None:
            runner.placing = False
            has_failed = isinstance(result, Exception)
            reply(failed(result) if has_failed else StubPlaced())
            # A pause that came meanwhile keeps it from running; a resume may have let it run already.
            if was_running and not (has_failed or self._parking or runner.running):
                self._run(runner)
            self._check_parked()

        def place() -> None:
            runner.thread.submit(runner.ghost.place_stub, placed)

        if was_running:
            runner.placing = True
            runner.when_stopped.append(place)
            runner.stop()
        else:
            place()

    def _start_vcpu(self, command: StartVcpu, reply: Reply) -> None:
        self._machine.signal(command.vcpu, _INIT)
        reply(InterruptRaised(self._machine.signal(command.vcpu, _STARTUP | command.vector)))

    def _init_vcpu(self, command: InitVcpu, reply: Reply) -> None:
        reply(InterruptRaised(self._machine.signal(command.vcpu, _INIT)))

    def _raise_interrupt(self, command: RaiseInterrupt, reply: Reply) -> None:
        data = _NMI if command.vector == _NMI_VECTOR else command.vector
        reply(InterruptRaised(self._machine.signal(command.vcpu, data)))

    def _open_target(self, command: OpenIpiTarget, reply: Reply) -> None:
        self._descriptors.receive()
        self._machine.open_ipi_target(command, self._descriptors.ipi_path(command.vcpu, command.vector))
        reply(IpiPathOpen())

    def _open_source(self, command: OpenIpiSource, reply: Reply) -> None:
        self._descriptors.receive()
        self._machine.open_ipi_source(command, self._descriptors.ipi_path(command.vcpu, command.vector))
        reply(IpiPathOpen())

    # ------------------------------------------------------------ replacement

    def states(self, done: Callable[[list[GhostState] | Exception], None]) -> None:
        """Tell what the ghosts are, for another worker that goes on for this one."""
        self._in_each(lambda runner: runner.ghost.state(), done)

    def go_on(self, states: Sequence[GhostState], offset: int, done: Callable[[list[Any] | Exception], None]) -> None:
        """Make the ghosts what they were in another worker, with this TSC offset."""
        by_vcpu = {state.vcpu: state for state in states}
        if by_vcpu.keys() != self._runners.keys():
            raise ConfigurationError(f"this worker has the ghosts {sorted(self._runners)}, not {sorted(by_vcpu)}")
        self.publish()

        def go_on(runner: GhostRunner) -> None:
            state = by_vcpu[runner.ghost.index]
            runner.ghost.kvm.set_tsc_offset(offset)
            runner.ghost.go_on(state)
            if state.waiting:
                self._machine.send_init(state.vcpu)

        self._in_each(go_on, done)

    def _in_each(self, job: Callable[[GhostRunner], Any], done: Callable[[Any], None]) -> None:
        """Do something in every ghost's thread; ``done`` gets the results, or the first exception."""
        left = len(self._runners)
        results: list[Any] = []

        def one_done(result: Any) -> None:
            results.append(result)
            if len(results) == left:
                done(next((each for each in results if isinstance(each, Exception)), results))

        if not left:
            done(results)
        for runner in self._runners.values():
            runner.thread.submit(bind(job, runner), one_done)

    # ------------------------------------------------------------ clocks

    def _read_clock(self, command: ReadClock, reply: Reply) -> None:
        first = self._machine.vcpus[0].kvm

        def have_offset(offset: Any) -> None:
            if isinstance(offset, Exception):
                reply(failed(offset))
                return
            self._set_offsets(offset, lambda error: reply(failed(error) if error else self._clock_now(offset)))

        self._threads[0].submit(first.get_tsc_offset, have_offset)

    def _clock_now(self, offset: int | None) -> Any:
        try:
            self._machine.vm.set_clock(0)  # only afterwards KVM tells the time of day that belongs to it
            clock, flags, _, realtime, _ = abi.CLOCK_DATA.unpack(self._machine.vm.get_clock())
        except WorkerError as error:
            return failed(error)
        return ClockRead(offset is not None, offset or 0, clock, realtime, flags)

    def _set_clock(self, command: SetClock, reply: Reply) -> None:
        offset = command.tsc_offset if command.has_tsc_offset else None
        self._set_offsets(offset, lambda error: reply(failed(error) if error else self._follow(command)))

    def _follow(self, command: SetClock) -> Any:
        known = bool(command.flags & abi.CLOCK_REALTIME)
        try:
            self._machine.vm.set_clock(command.clock, command.realtime if known else 0, abi.CLOCK_REALTIME * known)
            clock, flags, _, realtime, _ = abi.CLOCK_DATA.unpack(self._machine.vm.get_clock())
        except WorkerError as error:
            return failed(error)
        ahead = clock - (command.clock + realtime - command.realtime)
        return ClockSet(known and bool(flags & abi.CLOCK_REALTIME), ahead > 0, min(abs(ahead), (1 << 64) - 1))

    def _set_offsets(self, offset: int | None, done: Callable[[Exception | None], None]) -> None:
        """Give every vCPU and ghost one TSC offset, each in its own thread."""
        if offset is None:
            done(None)
            return
        left = len(self._threads)
        errors: list[Exception] = []

        def one_done(result: Any) -> None:
            nonlocal left
            left -= 1
            if isinstance(result, Exception):
                errors.append(result)
            if not left:
                done(errors[0] if errors else None)

        kvms = [*(vcpu.kvm for vcpu in self._machine.vcpus), *self._machine.ghost_vcpus]
        for kvm, thread in zip(kvms, self._threads, strict=True):
            thread.submit(bind(kvm.set_tsc_offset, offset), one_done)


#: MSI data: delivery modes of INIT (level asserted) and of SIPI with a vector; NMI.
_INIT = 0x4500
_STARTUP = 0x4600
_NMI = 0x400
_NMI_VECTOR = 2
