"""One worker resumes another's vCPUs: what predecessor and successor have to do (docs/smp.md)."""

from __future__ import annotations

from base import faults
from base.lean_typing import Any, Callable, Sequence
from ipc.errors import IpcError
from ipc.messages.replacement import (
    HandedOver,
    HandOver,
    LoadState,
    RollBack,
    RolledBack,
    StateLoaded,
    TakenOver,
    TakeOver,
)
from vcpu_worker import state as vcpu_state
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import ConfigurationError, StateError, WorkerError
from vcpu_worker.external_interrupt import ExternalInterrupt
from vcpu_worker.ghost_control import GhostControl
from vcpu_worker.lifecycle import Event
from vcpu_worker.machine import Machine
from vcpu_worker.replies import Command, Reply, failed
from vcpu_worker.runner import Runner


class Replacement:
    """Serves the commands of a live replacement, on both sides. ``advance`` is the worker's table of states."""

    def __init__(
        self,
        machine: Machine,
        ghosts: GhostControl,
        runners: Sequence[Runner],
        descriptors: DescriptorSet,
        advance: Callable[[Event], None],
        *,
        external_interrupt: ExternalInterrupt,
    ) -> None:
        self._machine = machine
        self._ghosts = ghosts
        self._runners = {runner.vcpu.index: runner for runner in runners}
        self._descriptors = descriptors
        self._advance = advance
        self._external_interrupt = external_interrupt
        self._loaded: dict[int, vcpu_state.VcpuState] = {}
        self.commands: dict[type[Any], Command] = {
            HandOver: self._hand_over,
            RollBack: self._roll_back,
            LoadState: self._load,
            TakeOver: self._take_over,
        }

    # ------------------------------------------------------------ the predecessor

    def _hand_over(self, command: HandOver, reply: Reply) -> None:
        faults.visit("vcpu.hand_over")
        self._advance(Event.HAND_OVER)
        self._machine.hand_over()
        self._external_interrupt.ignore()

        held = tuple(vcpu for vcpu, runner in self._runners.items() if runner.loop.start_held)

        def told(states: Any) -> None:
            reply(failed(states) if isinstance(states, Exception) else HandedOver(tuple(states), held))

        self._ghosts.states(told)

    def _roll_back(self, command: RollBack, reply: Reply) -> None:
        self._advance(Event.ROLL_BACK)
        self._machine.roll_back()
        self._external_interrupt.listen(ask=True)
        reply(RolledBack())

    # ------------------------------------------------------------ the successor

    def _load(self, command: LoadState, reply: Reply) -> None:
        faults.visit("vcpu.load")
        self._advance(Event.LOAD)
        runner = self._runners.get(command.vcpu)
        if runner is None:
            raise ConfigurationError(f"this worker does not run vCPU {command.vcpu}")
        if command.version != vcpu_state.VERSION:
            raise StateError(f"the state of vCPU {command.vcpu} has version {command.version}")
        state = vcpu_state.decode(command.state)

        def loaded(result: Any) -> None:
            if isinstance(result, Exception):
                reply(failed(result))
                return
            self._loaded[command.vcpu] = state
            reply(StateLoaded())

        def load() -> None:
            vcpu_state.load(runner.vcpu.kvm, state)
            # The guest's watchdogs were to be told of the stop by the worker before, at the vCPU's next entry there.
            runner.vcpu.kvm.kvmclock_ctrl()

        runner.thread.submit(load, loaded)

    def _take_over(self, command: TakeOver, reply: Reply) -> None:
        faults.visit("vcpu.take_over")
        if self._loaded.keys() != self._runners.keys():
            raise StateError("the state of a vCPU is missing")
        self._advance(Event.LOAD)
        self._descriptors.receive()
        paths = [(path, self._descriptors.ipi_path(path.vcpu, path.vector)) for path in command.paths]
        self._machine.take_over(command.routes, paths)
        if not command.last:
            reply(TakenOver())
            return
        first = next(iter(self._loaded.values()))

        def finished(result: Any) -> None:
            error = result if isinstance(result, Exception) else self._finish(first, command.held)
            reply(TakenOver() if error is None else failed(error))

        self._ghosts.go_on(command.ghosts, first.tsc_offset, finished)

    def _finish(self, first: vcpu_state.VcpuState, held: Sequence[int]) -> Exception | None:
        """Everything but the clock is there: from now on the worker is paused like any other."""
        try:
            vcpu_state.load_clock(self._machine.vm, first)
            for vcpu, runner in self._runners.items():
                # Its state does not tell whether the other workers are ready for it: INIT and SIPI may have come.
                runner.loop.go_on(start_held=vcpu in held)
            self._external_interrupt.listen(ask=True)
            self._advance(Event.TAKE_OVER)
        except (WorkerError, IpcError) as error:
            return error
        return None
