"""Why and how a microVM ends: what its workers report, what its guest asks for, and the exit code that follows."""

from __future__ import annotations

from base import exit_codes
from base.lean_typing import Callable
from ipc.messages.ghosts import GhostRecovered
from ipc.messages.supervisor import CellEnded
from ipc.messages.worker import VcpuExited
from vmm.cells.worker import Worker
from vmm.errors import StateError
from vmm.machine.post_mortem import TAIL_LENGTH, Cause, Failure, of_end, of_vcpu, report
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG
from vmm.observe.metrics import METRICS, SIGNAL_KEYS

#: VcpuExited.reason of a triple fault, by which guests reset their machine, too.
VCPU_SHUTDOWN = "shutdown"


class Ending:
    """One per microVM. ``console_tail`` returns the last bytes that the guest has sent, as many as it is asked for.

    ``restarts``: a guest that reboots gets a machine that starts anew (``restart_wanted``); the owner makes it.
    """

    def __init__(self, console_tail: Callable[[int], bytes], *, restarts: bool = False) -> None:
        self.restarts = restarts
        self.restart_wanted = False
        #: What the microVM ended with, once it has.
        self.exit_code: int | None = None
        #: Why it failed, if it did.
        self.failure: Failure | None = None
        #: Called with a worker that has ended or failed, and how, when that was reported.
        self.on_lost: Callable[[Worker, str], None] = lambda worker, text: None
        self._console_tail = console_tail

    def watch(self, worker: Worker) -> None:
        """What happens to this worker happens to the microVM from now on."""
        worker.on_vcpu_exited = self._vcpu_exited
        worker.on_failed = self._worker_failed
        worker.on_ended = self._worker_ended
        worker.on_ghost_recovered = self._ghost_recovered

    @property
    def has_come(self) -> bool:
        """Has the microVM ended, or is it about to, or to start anew?"""
        return self.exit_code is not None or self.restart_wanted

    def require_alive(self) -> None:
        """Raise StateError after the end."""
        if self.exit_code is not None:
            raise StateError("The microVM has ended.")

    def stop(self, exit_code: int) -> None:
        """End the microVM: the main loop returns with this code. The first code counts, but 0 yields to an error."""
        if self.exit_code is None:
            LOG.info("Vmm is stopping.")
            EVENTS.emit("microvm-stopping", exit_code=exit_code)
        if not self.exit_code:
            self.exit_code = exit_code

    def guest_reset(self) -> None:
        """The guest has reset the machine."""
        if not self.restarts:
            self.stop(exit_codes.OK)
        elif self.exit_code is None:
            self.restart_wanted = True

    # ------------------------------------------------------------ failures

    def cannot_go_on(self, text: str) -> None:
        """An operation could be neither completed nor rolled back."""
        self._fail_once(Failure(Cause.OPERATION, "", text, exit_codes.GENERIC_ERROR), None)

    def forwarding_failed(self, text: str) -> None:
        """An interrupt between vCPUs was lost: the guest cannot go on."""
        self._fail_once(Failure(Cause.INTERRUPT, "forwarding", text, exit_codes.GENERIC_ERROR), None)

    def event_blocked(self, text: str) -> None:
        """A worker has stopped the loop for a while. Which one it was cannot be told."""
        self._fail_once(Failure(Cause.PROTOCOL, "", text, exit_codes.GENERIC_ERROR), None)

    def _ghost_recovered(self, worker: Worker, event: GhostRecovered) -> None:
        text = f"Worker vcpu {worker.index}: {event.text}."
        if event.fatal:
            self._fail_once(Failure(Cause.INTERRUPT, "ghost", text, exit_codes.GENERIC_ERROR), worker)
        else:
            LOG.warn(text)

    def _vcpu_exited(self, worker: Worker, event: VcpuExited) -> None:
        failure = of_vcpu(worker, event)
        if self.exit_code is not None:
            # A guest that was reset runs on until its worker ends, into a triple fault: that is no news.
            LOG.debug(failure.text)
            return
        if self.restart_wanted or (self.restarts and event.reason == VCPU_SHUTDOWN):
            LOG.debug(failure.text)
            self.guest_reset()
            return
        EVENTS.emit("vcpu-exited", vcpu=event.vcpu, reason=event.reason, exit_code=event.code)
        if event.code:
            METRICS["vcpu"].add("failures")
            self._fail(failure, worker)
        else:
            LOG.info(failure.text)
            self.stop(0)
        self.on_lost(worker, failure.text)

    def _worker_failed(self, worker: Worker, text: str) -> None:
        self._fail(Failure(Cause.PROTOCOL, "", text, exit_codes.GENERIC_ERROR), worker)
        self.on_lost(worker, text)

    def _worker_ended(self, worker: Worker, notice: CellEnded) -> None:
        if self.exit_code is not None:
            return
        failure = of_end(worker, notice)
        if notice.wall == "seccomp":
            METRICS["seccomp"].add("num_faults")
        if notice.signal and failure.exit_code in SIGNAL_KEYS:
            METRICS["signals"].store(SIGNAL_KEYS[failure.exit_code], 1)
        self._fail(failure, worker)
        if notice.wall == "seccomp":
            LOG.error(f"Shutting down VM after intercepting a bad syscall of worker vcpu {worker.index}.")
        self.on_lost(worker, failure.text)

    def _fail_once(self, failure: Failure, worker: Worker | None) -> None:
        if self.exit_code is None:
            self._fail(failure, worker)

    def _fail(self, failure: Failure, worker: Worker | None) -> None:
        """Report why the microVM cannot go on, and end it."""
        self.failure = self.failure or failure
        report(failure, worker, self._console_tail(TAIL_LENGTH).decode(errors="backslashreplace"))
        self.stop(failure.exit_code)
