"""Pause and resume: what each step says to a worker. A replacement pauses and resumes the guest by the same steps."""

from __future__ import annotations

import time

from base.lean_typing import Any, Callable, Protocol
from ipc.messages.ghosts import GhostsParked, ParkGhosts, QuiescenceRead, ReadQuiescence
from ipc.messages.worker import Pause, Paused, Resume, Resumed
from vmm.cells.lifecycle import WorkerEvent
from vmm.cells.worker import Worker
from vmm.operations import tables
from vmm.operations.driver import Answered, Wait
from vmm.operations.quiescence import not_quiescent, quiescence_of
from vmm.operations.run import Member
from vmm.operations.tables import Procedure, StepName


class Guest(Protocol):
    """What these steps ask of the microVM."""

    vcpus_handles: list[Worker]

    def drained(self) -> bool:
        """Have all exits of the parked vCPUs been executed?"""

    def not_drained(self) -> None:
        """They were not in time: whoever has one open broke the protocol."""

    def clock_failed(self, count: int) -> None:
        """So many vCPUs could not be told that they were stopped."""


class Pausing:
    """Carries out the steps of ``tables.PAUSE`` and ``tables.RESUME``; an operation in itself."""

    predecessor_index = -1

    def __init__(self, guest: Guest, procedure: Procedure) -> None:
        self.procedure = procedure
        #: CLOCK_MONOTONIC in ns: when the guest began to stand still, and when it ran again.
        self.parked_at = self.resumed_at = 0
        self._guest = guest
        self._steps: dict[StepName, Callable[[Member, int, Answered], Wait | None]] = {
            StepName.PARK: self._park,
            StepName.DRAIN: self._drain,
            StepName.PARK_GHOSTS: self._park_ghosts,
            StepName.VERIFY: self._verify,
            StepName.RESUME: self._resume,
        }

    def step(self, name: StepName, member: Member, timeout_ns: int, answered: Answered) -> Wait | None:
        """As ``vmm.operations.driver.Operation`` wants it."""
        return self._steps[name](member, timeout_ns, answered)

    def commit(self) -> None:
        """Nothing is decided for good."""

    def dismiss(self, member: Member) -> None:
        """Nobody comes or leaves."""

    def is_successor(self, worker: Worker) -> bool:
        """Nobody does."""
        return False

    def _worker(self, member: Member) -> Worker:
        return next(worker for worker in self._guest.vcpus_handles if worker.index == member.worker)

    def _park(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        def parked(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._guest.clock_failed(reply.kvmclock_ctrl_failures)
            answered(refusal)

        self.parked_at = self.parked_at or time.monotonic_ns()
        self._worker(member).ask(Pause(), Paused, parked, timeout_ns=timeout_ns, event=WorkerEvent.PAUSED)

    def _drain(self, member: Member, timeout_ns: int, answered: Answered) -> Wait:
        return Wait(self._guest.drained, on_late=self._guest.not_drained)

    def _park_ghosts(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        def parked(reply: Any, refusal: str) -> None:
            answered(refusal)

        self._worker(member).ask(ParkGhosts(), GhostsParked, parked, timeout_ns=timeout_ns)

    def _verify(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        worker = self._worker(member)
        if not worker.assignment.ghosts:
            answered("")  # it has nothing that could hold anything
            return

        def read(reply: Any, refusal: str) -> None:
            answered(refusal or not_quiescent(quiescence_of(worker, reply, 0)))

        worker.ask(ReadQuiescence(), QuiescenceRead, read, timeout_ns=timeout_ns)

    def _resume(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        def resumed(refusal: str) -> None:
            self.resumed_at = time.monotonic_ns()
            answered(refusal)

        resume(self._worker(member), resumed)


def pausing(guest: Guest) -> Pausing:
    """Park all vCPUs."""
    return Pausing(guest, tables.PAUSE)


def resuming(guest: Guest) -> Pausing:
    """Let all vCPUs run."""
    return Pausing(guest, tables.RESUME)


def resume(worker: Worker, answered: Answered) -> None:
    """Tell a worker to run. There is no deadline: one that was stopped does it as soon as it goes on."""
    worker.note(WorkerEvent.START)
    worker.ask(Resume(), Resumed, lambda reply, refusal: answered(refusal), timeout_ns=0, event=WorkerEvent.RESUMED)
