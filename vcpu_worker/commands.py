"""The commands of a worker: each hands jobs to the vCPUs' threads, and replies. Never waits for a vCPU."""

from __future__ import annotations

import select
import time

from base import faults
from base.exit_codes import GENERIC_ERROR
from base.lean_typing import Any, Callable
from ipc import bounds
from ipc.errors import IpcError
from ipc.messages.ghosts import VCPU_STARTING
from ipc.messages.records import MAX_TEXT
from ipc.messages.vm import RoutesSet, SetRoutes
from ipc.messages.worker import (
    Configure,
    Configured,
    DumpCpuConfig,
    DumpedCpuConfig,
    Finish,
    Finished,
    HostCpuRead,
    Pause,
    Paused,
    Ping,
    Pong,
    ReadHostCpu,
    Resume,
    Resumed,
    SavedState,
    SaveState,
    VcpuExited,
)
from vcpu_worker import state as vcpu_state
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import ConfigurationError, StateError, WorkerError
from vcpu_worker.external_interrupt import ExternalInterrupt
from vcpu_worker.ghost_control import GhostControl
from vcpu_worker.lifecycle import Event, State, next_state
from vcpu_worker.machine import Machine
from vcpu_worker.replacement import Replacement
from vcpu_worker.replies import Command, Reply, bind, failed, text_of
from vcpu_worker.reporting import REASON_RUN_FAILED, STARTING, FinalExit
from vcpu_worker.runner import Runner
from vcpu_worker.vcpu_thread import Completions, VcpuThread
from vcpu_worker.vm_changes import VmChanges

#: A vCPU that is asked to stop is kicked at once and again after 1, 2, 4 … ms until it is parked.
FIRST_KICK_PAUSE_MS = 1
LAST_KICK_PAUSE_MS = 64
#: How long Finish waits for the vCPUs to park; a vCPU whose exit nobody answers cannot park.
FINISH_TIMEOUT_MS = 500
#: In these it has no VM that anything could be asked of.
_UNCONFIGURED = (State.CREATED, State.CONFIGURING, State.FAILED)


class Control:
    """What a worker with a VM can be told (vcpu_worker.serving). ``send`` takes events, which answer no command.

    ``threads`` are those of the machine's vCPUs, then of its ghosts. ``tighten`` is called when it is configured: from
    then on it does what a running machine needs, and nothing else. ``await_tightened`` is called before the next
    command: while that comes, the supervisor reads the walls back.
    """

    def __init__(
        self,
        send: Callable[[Any], object],
        descriptors: DescriptorSet,
        completions: Completions,
        machine: Machine,
        threads: list[VcpuThread],
        *,
        tighten: Callable[[], None],
        await_tightened: Callable[[], None],
    ) -> None:
        self.state = State.CREATED
        self._tighten = tighten
        self._await_tightened = await_tightened
        self._send = send
        self._descriptors = descriptors
        self._machine = machine
        own = threads[: len(machine.vcpus)]
        self._runners = [Runner(vcpu, thread) for vcpu, thread in zip(machine.vcpus, own, strict=True)]
        self._waiting_for_park: list[Reply] = []
        #: A Resume waits for the vCPUs to park; what comes after it has to wait, too.
        self._runs_on = False
        self._clock_failures = 0
        self._kick_pause_ms = FIRST_KICK_PAUSE_MS
        self._next_kick_ns = 0
        self._finish_deadline_ns = 0
        self._ended = False
        self._ghosts = GhostControl(
            machine, threads, completions, descriptors, send=send, ghost_failed=self._ghost_failed
        )
        self._ghosts.on_own_event_done = self._release
        self._vm_changes = VmChanges(machine, descriptors)
        self._external_interrupt = ExternalInterrupt()
        replacement = Replacement(
            machine,
            self._ghosts,
            self._runners,
            descriptors,
            self._advance,
            external_interrupt=self._external_interrupt,
        )
        self._commands: dict[type[Any], Command] = {
            ReadHostCpu: self._read_host_cpu,
            Configure: self._configure,
            SetRoutes: self._set_routes,
            Resume: self._resume,
            Pause: self._pause,
            SaveState: self._save_state,
            DumpCpuConfig: self._dump_cpu_config,
            Ping: self._ping,
            Finish: self._finish,
            **replacement.commands,
            **self._vm_changes.commands,
        }

    # ------------------------------------------------------------ what the loop asks

    def find(self, kind: type[Any]) -> Command | None:
        """Return what carries out a command of this class; None: it is no command now."""
        self._await_tightened()
        command = self._commands.get(kind)
        if command is None and self.state not in _UNCONFIGURED:
            command = self._ghosts.commands.get(kind)
        return command

    def watch(self, poll: select.poll) -> None:
        """Take what the loop waits with: what is registered there besides comes to :meth:`ready`."""
        self._external_interrupt.watch(poll)

    def ready(self, descriptor: int) -> None:
        """Something has happened on a descriptor."""
        if descriptor == self._external_interrupt.eventfd:
            self._external_interrupt.read()

    def due_ns(self) -> int:
        """Return when vCPUs or ghosts are to be stopped again (CLOCK_MONOTONIC); 0: not at all."""
        return min((each for each in (self._next_kick_ns, self._ghosts.due_ns) if each), default=0)

    def act_if_due(self) -> None:
        """Kick what was asked to stop and has not."""
        self._kick_if_due()
        self._ghosts.stop_again_if_due()

    def has_ended(self) -> bool:
        """Tell whether the worker has finished."""
        return self._ended

    def _advance(self, event: Event) -> None:
        """Go on to the next state. Raises StateError if the table refuses."""
        self.state = next_state(self.state, event)

    # ------------------------------------------------------------ configuration

    def _read_host_cpu(self, command: ReadHostCpu, reply: Reply) -> None:
        reply(HostCpuRead(tuple(self._machine.supported_cpuid)))

    def _configure(self, command: Configure, reply: Reply) -> None:
        faults.visit("vcpu.configure")
        if command.resumes_other:
            faults.visit("vcpu.resumes_other")
        machine = self._machine
        if not self._vm_changes.has_memory:
            raise ConfigurationError("the guest has no memory yet")
        self._advance(Event.CONFIGURE)
        try:
            self._descriptors.receive()
            machine.configure(command, self._descriptors)
            bounds.guest_runs(self._vm_changes.mapped_bytes)
            self._external_interrupt.attach(machine.external_interrupt, self._external_interrupt_risen)
            if not command.resumes_other:
                self._external_interrupt.listen(ask=False)
            for runner in self._runners:
                self._descriptors.send_vcpu(runner.vcpu.index, runner.vcpu.kvm.descriptor)
        except (WorkerError, IpcError):
            self._advance(Event.FAIL)  # half a configuration cannot be repeated
            raise
        ghosts = self._ghosts
        if not command.resumes_other:  # else those of the worker before still count there
            ghosts.publish()
        results: list[Any] = []
        expected = len(self._runners)

        def finished(result: Any) -> None:
            if isinstance(result, Exception):
                self._advance(Event.FAIL)
                reply(failed(result))
                return
            self._advance(Event.CONFIGURED_TO_GO_ON if command.resumes_other else Event.CONFIGURED)
            faults.visit("vcpu.configured")
            reply(Configured(next(each for each in results if each is not None)))
            self._tighten()  # while the next command is on its way

        def configured(result: Any) -> None:
            results.append(result)
            if len(results) < expected:
                return
            failures = [each for each in results if isinstance(each, Exception)]
            # Every LAPIC has been written by now, as the stub needs it.
            if failures or not ghosts.place_first(finished):
                finished(failures[0] if failures else None)

        for runner in self._runners:
            runner.thread.submit(bind(machine.configure_vcpu, runner.vcpu, command), configured)
        expected += ghosts.configure(lambda kvm: machine.configure_kvm(kvm, command), configured)

    def _set_routes(self, command: SetRoutes, reply: Reply) -> None:
        if self.state in _UNCONFIGURED:
            raise StateError(f"the worker is {self.state.value}: it has no interrupts yet")
        self._machine.set_routes(command.routes)
        reply(RoutesSet())

    # ------------------------------------------------------------ run and park

    def _resume(self, command: Resume, reply: Reply) -> None:
        faults.visit("vcpu.resume")
        before = self.state
        after = next_state(before, Event.RESUME)
        if after is State.PAUSING:
            self._runs_on = True
            self._waiting_for_park.append(self._again(self._resume, command, reply))
            return
        for runner in self._runners:
            if runner.final is not None:
                raise StateError(f"vCPU {runner.vcpu.index} has ended: {runner.final.text}")
        self.state = after
        reply(Resumed())
        if before is State.RUNNING:
            return
        self._ghosts.run()
        for runner in self._runners:
            if not runner.held:
                self._run(runner)

    def _run(self, runner: Runner) -> None:
        runner.running = True
        runner.loop.allow_to_run()
        loop = runner.loop
        runner.thread.submit(loop.run_held if loop.start_held else loop.run, bind(self._stopped, runner))

    def _release(self, vcpu: int) -> None:
        """Every other worker is ready for this vCPU to start."""
        for runner in self._runners:
            if runner.vcpu.index == vcpu and runner.held:
                runner.held = runner.loop.start_held = False
                if self.state is State.RUNNING:
                    self._run(runner)

    def _ghost_failed(self, vcpu: int, text: str) -> None:
        """A ghost cannot go on, and what is sent to its vCPU is lost: the controller was told and ends the microVM."""
        for runner in self._runners:
            if runner.running:
                runner.stop()

    def _pause(self, command: Pause, reply: Reply) -> None:
        faults.visit("vcpu.pause")
        before = self.state
        self._advance(Event.PAUSE)
        if self.state is State.PAUSED:
            reply(Paused(0))
            return
        if self._runs_on:
            self._waiting_for_park.append(self._again(self._pause, command, reply))
            return
        self._waiting_for_park.append(lambda _: reply(Paused(self._clock_failures)))
        if before is State.RUNNING:
            self._clock_failures = 0
            self._stop_all()

    def _stop_all(self) -> None:
        for runner in self._runners:
            if runner.running:
                runner.stop()
        self._kick_pause_ms = FIRST_KICK_PAUSE_MS
        self._schedule_kick()
        self._parked()

    def _schedule_kick(self) -> None:
        self._next_kick_ns = time.monotonic_ns() + self._kick_pause_ms * 1_000_000

    def _kick_if_due(self) -> None:
        now = time.monotonic_ns()
        if not self._next_kick_ns or now < self._next_kick_ns:
            return
        if self.state is State.FINISHING and now >= self._finish_deadline_ns:
            self._all_parked()
            return
        for runner in self._runners:
            if runner.running:
                runner.thread.kick()
        self._kick_pause_ms = min(2 * self._kick_pause_ms, LAST_KICK_PAUSE_MS)
        self._schedule_kick()

    def _external_interrupt_risen(self) -> None:
        for runner in self._runners:
            if runner.vcpu.index == 0:  # the others have no such line
                runner.loop.raise_external_interrupt()
                if runner.running:
                    runner.thread.kick()

    def _stopped(self, runner: Runner, result: Any) -> None:
        """A vCPU left its run loop."""
        if result is STARTING:
            runner.running = False
            runner.held = True
            self._ghosts.add_event(VCPU_STARTING, runner.vcpu.index)
            self._parked()
            return
        if result is None and self.state is State.PAUSING:
            # The guest's watchdogs are told by the vCPU's own thread; it counts as running until that is done.
            runner.thread.submit(runner.vcpu.kvm.kvmclock_ctrl, bind(self._clock_noted, runner))
            return
        runner.running = False
        if result is not None:
            if isinstance(result, Exception):
                result = FinalExit(REASON_RUN_FAILED, GENERIC_ERROR, (), f"internal error: {text_of(result)}")
            runner.final = result
            detail = tuple(value & (1 << 64) - 1 for value in result.detail[:16])
            self._send(VcpuExited(runner.vcpu.index, result.reason, result.code, detail, result.text[:MAX_TEXT]))
        self._parked()

    def _clock_noted(self, runner: Runner, noted: Any) -> None:
        if noted is not True:
            self._clock_failures += 1
        runner.running = False
        self._parked()

    def _parked(self) -> None:
        if self.state in (State.PAUSING, State.FINISHING) and not any(runner.running for runner in self._runners):
            self._all_parked()

    def _all_parked(self) -> None:
        self._next_kick_ns = 0
        if self.state is State.PAUSING:
            self._advance(Event.PARKED)
        waiting, self._waiting_for_park, self._runs_on = self._waiting_for_park, [], False
        for callback in waiting:
            callback(None)

    @staticmethod
    def _again(method: Callable[[Any, Reply], None], command: Any, reply: Reply) -> Reply:
        """Return what carries out a command that had to wait until the vCPUs were parked."""

        def carry_out(_: Any) -> None:
            try:
                method(command, reply)
            except WorkerError as error:
                reply(failed(error))

        return carry_out

    # ------------------------------------------------------------ state

    def _runner(self, vcpu: int) -> Runner:
        try:
            self._advance(Event.SAVE)
        except StateError:
            raise StateError(f"the worker is {self.state.value}: pause it first") from None
        for runner in self._runners:
            if runner.vcpu.index == vcpu:
                return runner
        raise ConfigurationError(f"this worker does not run vCPU {vcpu}")

    def _save_state(self, command: SaveState, reply: Reply) -> None:
        faults.visit("vcpu.save")
        runner = self._runner(command.vcpu)
        machine = self._machine

        def save() -> bytes:
            return vcpu_state.encode(vcpu_state.save(machine.vm, runner.vcpu.kvm, machine.state_msrs))

        def saved(result: Any) -> None:
            if isinstance(result, Exception):
                reply(failed(result))
            else:
                reply(SavedState(command.vcpu, vcpu_state.VERSION, result))

        runner.thread.submit(save, saved)

    def _dump_cpu_config(self, command: DumpCpuConfig, reply: Reply) -> None:
        runner = self._runner(command.vcpu)
        machine = self._machine
        kvm = runner.vcpu.kvm

        def dump() -> DumpedCpuConfig:
            return DumpedCpuConfig(command.vcpu, tuple(kvm.get_cpuid()), tuple(kvm.get_msrs(machine.state_msrs)))

        def dumped(result: Any) -> None:
            reply(failed(result) if isinstance(result, Exception) else result)

        runner.thread.submit(dump, dumped)

    # ------------------------------------------------------------ life

    def _ping(self, command: Ping, reply: Reply) -> None:
        for runner in self._runners:
            if runner.vcpu.loop is not None:
                runner.vcpu.loop.publish_counters()
        reply(Pong(self.state.value))

    def _finish(self, command: Finish, reply: Reply) -> None:
        faults.visit("vcpu.finish")

        def parked(_: Any) -> None:
            reply(Finished())
            self._ended = True

        self._advance(Event.FINISH)
        self._finish_deadline_ns = time.monotonic_ns() + FINISH_TIMEOUT_MS * 1_000_000
        self._waiting_for_park.append(parked)
        self._stop_all()
