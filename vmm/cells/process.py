"""The process of a worker or device cell as the controller has it: spawn, pidfd, signals, death."""

from __future__ import annotations

import os
import select
import time

from base.event_manager import EventManager
from base.lean_std import signal, signal_name, socket
from ipc.launch_plan import ROLE_VCPU, Assignment
from ipc.messages.supervisor import CellEnded
from vmm.cells.lifecycle import ALIVE, DEADLINES, WorkerEvent, WorkerState, next_state
from vmm.cells.supervisor import SupervisorClient
from vmm.errors import SupervisorError

#: A process that ends closes its channels some time before its pidfd says so.
DYING_MS = 100


class CellProcess:
    """Base of the controller's side of a cell. Its state moves by the table and no other way."""

    #: Whom the supervisor is to fork.
    ROLE = ROLE_VCPU

    def __init__(self, index: int, events: EventManager, supervisor: SupervisorClient) -> None:
        self.index = index
        #: What it was forked for, or will be.
        self.assignment = Assignment(index, (index,), ())
        self.state = WorkerState.ABSENT
        self.pid = 0
        self.ended: CellEnded | None = None
        self.failure = ""
        self._events = events
        self._supervisor = supervisor
        self._pidfd = -1
        self._spawn_request = 0
        self._kill_wanted = False

    @property
    def alive(self) -> bool:
        """True while the process exists (as far as we know)."""
        return self.state in ALIVE

    @property
    def usable(self) -> bool:
        """True while it can be asked for something."""
        return self.alive and self.state is not WorkerState.FAILED

    @property
    def title(self) -> str:
        """The cell in a sentence."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The same, with its process."""
        return f"{self.title} (pid {self.pid})"

    def _state_changed(self) -> None:
        """Tell the world."""
        raise NotImplementedError

    def _move(self, event: WorkerEvent) -> None:
        before, self.state = self.state, next_state(self.state, event)
        if self.state is not before:
            self._state_changed()

    # ------------------------------------------------------------ spawn

    def _submit_spawn(self) -> None:
        self.ended = None
        self.failure = ""
        self.pid = 0
        self._kill_wanted = False
        self._spawn_request = self._supervisor.submit_spawn(self.assignment)
        self._move(WorkerEvent.SPAWN)

    def _spawn_answered(self) -> bool:
        return not self._spawn_request or self._supervisor.ready(self._spawn_request)

    def _collect_spawn(self) -> None:
        """Take the supervisor's answer, which is here. Raises SupervisorError if it refused."""
        request, self._spawn_request = self._spawn_request, 0
        try:
            spawned, owned = self._supervisor.collect_spawn(request)
        except SupervisorError as error:
            self.failure = str(error)
            self._move(WorkerEvent.DIED)
            self._release()
            raise
        with owned:
            self._pidfd = owned.take()
            self._take_descriptor_channel(socket.socket(fileno=owned.take()))
        self.pid = spawned.pid
        if self._kill_wanted:
            self._send_kill()

    def _take_descriptor_channel(self, pair: socket.socket) -> None:
        """Take our end of its descriptor channel."""
        pair.close()

    # ------------------------------------------------------------ end

    def kill(self) -> None:
        """SIGKILL by the supervisor or, where there is none any more, by pidfd; returns at once.

        A cell that was asked for and whose pidfd is not here yet is killed when it comes.
        """
        if not self.alive:
            return
        self._kill_wanted = True
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()
            except SupervisorError:
                return  # there is nothing to kill
        elif self._pidfd >= 0:
            self._send_kill()

    def _send_kill(self) -> None:
        # By the supervisor, as long as there is one: so it knows that nobody else has ended the cell.
        if self._supervisor.signal(self.index, self.pid, signal.SIGKILL, self.ROLE):
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except OSError:
            pass  # it has ended, or nobody can end it but the kernel, which does as the supervisor is gone

    def _has_exited(self, patience_ms: int) -> bool:
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(patience_ms))

    def wait_ended(self, timeout_ns: int = 0) -> bool:
        """Wait until the supervisor has reaped the cell; kill it after ``timeout_ns`` (0: as the table says)."""

        def ended() -> bool:
            return not self.alive or self._supervisor.closed

        def ended_or_answered() -> bool:
            return ended() or bool(self._spawn_request and self._spawn_answered())

        timeout_ns = timeout_ns or DEADLINES[WorkerState.FINISHING].nanoseconds
        self._events.run_until(ended_or_answered, time.monotonic_ns() + timeout_ns)
        if not ended():
            self.kill()
            self._events.run_until(ended, time.monotonic_ns() + timeout_ns)
        return not self.alive

    def ended_how(self) -> str:
        """Say how the process ended, in words that follow its name."""
        if self.ended is None:
            return f"is {self.state.value}"
        if self.ended.text:
            return f"could not start: {self.ended.text}"
        if self.ended.wall:
            return f"was ended by its {self.ended.wall} wall"
        if self.ended.signal:
            return f"was ended by signal {signal_name(self.ended.signal)}"
        return f"exited with status {self.ended.status}"

    def _release(self) -> None:
        """Release what belongs to the process."""
        if self._spawn_request:
            self._supervisor.abandon(self._spawn_request)
            self._spawn_request = 0
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
