"""Commands to a worker or device cell and their replies; how it is asked to end, and that it has ended."""

from __future__ import annotations

import time

from base.lean_typing import Any, Callable, TypeVar
from ipc.errors import IpcError, MessageError
from ipc.messages.records import Failed
from ipc.messages.supervisor import CellEnded
from vmm.cells.handshake import CellHandshake
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.process import DYING_MS
from vmm.cells.supervisor import internal_error
from vmm.errors import SupervisorError, VmmError

#: How long a command may take for which nobody says otherwise.
COMMAND_TIMEOUT_NS = 30 * SECOND_NS

Reply = TypeVar("Reply")

#: What such a cell says changes nothing any more.
_LEAVING = (WorkerState.FINISHING, WorkerState.REPLACED)


class CellCommands(CellHandshake):
    """A cell that can be told something. Every wait runs the event loop."""

    #: What it is told to end.
    FINISH: Any

    def cell_ended(self, notice: CellEnded) -> None:
        """The supervisor reaped the process."""
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()  # it died before we looked at the answer to our request
            except SupervisorError:
                return
        if notice.pid != self.pid or not self.alive:
            return
        self._receive()
        self.ended = notice
        self._move(WorkerEvent.DIED)
        self._close_channel()
        self._replies.drop_callbacks()
        self._has_ended(notice)

    def _has_ended(self, notice: CellEnded) -> None:
        """Tell the owner."""
        raise NotImplementedError

    def submit(self, message: Any, callback: Callable[[Any], None] | None = None, timeout_ns: int | None = None) -> int:
        """Send a command; the reply goes to ``callback`` or waits for :meth:`collect`. Never runs the event loop.

        A cell that gets it later than after ``timeout_ns`` (0: however late) does not carry it out. Raises
        ``ERROR``, or MicrovmEndedError.
        """
        if self.state is WorkerState.FAILED:
            raise self.error()
        timeout_ns = COMMAND_TIMEOUT_NS if timeout_ns is None else timeout_ns
        return self._submit(message, callback, time.monotonic_ns() + timeout_ns if timeout_ns else 0)

    def ask(
        self,
        message: Any,
        expected: type[Any],
        answered: Callable[[Any, str], None],
        *,
        timeout_ns: int,
        event: WorkerEvent | None = None,
    ) -> None:
        """Send a command; ``answered`` gets the reply of the expected kind, or None and why it was refused.

        A cell that has ended, or does so meanwhile, does not answer: its end is reported by itself.
        """

        def replied(reply: Any) -> None:
            if isinstance(reply, expected):
                if event is not None:
                    self.note(event)
                answered(reply, "")
            elif isinstance(reply, Failed):
                answered(None, reply.text)
            else:
                self.breach(f"{type(reply).__name__} in answer to another command")

        try:
            self.submit(message, replied, timeout_ns)
        except VmmError:
            pass

    def note(self, event: WorkerEvent) -> None:
        """Note what has become of a command, unless nothing of the cell counts any more."""
        if self.usable and self.state not in _LEAVING:
            self._move(event)

    def _submit(self, message: Any, callback: Callable[[Any], None] | None, deadline: int) -> int:
        if not self.alive or self._channel is None:
            raise self.error()
        try:
            sequence = self._channel.send(message, deadline=deadline)
        except MessageError as error:  # it is us who break it, and clients know no names of our messages
            self._fail(internal_error("a command to a cell", error))
            raise self.error() from None
        except IpcError as error:
            if not self._has_exited(DYING_MS):
                self.breach(str(error))
                raise self.error() from None
            # The supervisor is about to say how it ended; that counts, not that it can no longer be asked.
            raise self.ERROR(f"{self.name} has ended.") from None
        self._replies.expect(sequence, callback)
        if not self._receiving:  # else what comes is read there: a guest decides how often in a row
            self._receive()  # sending may have consumed the edge of the descriptor
        return sequence

    def collect(self, sequence: int, expected: type[Reply]) -> Reply:
        """Wait for a reply. Raises ``ERROR`` when the cell fails, dies, refuses or is too slow."""

        def settled() -> bool:
            return self._replies.has(sequence) or not self.alive or self.state is WorkerState.FAILED

        if not settled():
            self._events.run_until(settled, time.monotonic_ns() + COMMAND_TIMEOUT_NS)
        reply = self._replies.take(sequence)
        if isinstance(reply, expected):
            return reply
        if reply is None:
            if self.alive and self.state is not WorkerState.FAILED:
                raise self.ERROR(f"{self.name} did not answer within {COMMAND_TIMEOUT_NS // SECOND_NS} s.")
        elif isinstance(reply, Failed):
            raise self.ERROR(reply.text)
        else:
            self.breach(f"{type(reply).__name__} in answer to another command")
        raise self.error()

    def request(self, message: Any, expected: type[Reply]) -> Reply:
        """Send a command and wait for its reply. Raises as :meth:`collect` does."""
        try:
            sequence = self.submit(message)
        except self.ERROR:
            self._wait_if_exited()
            raise self.error() from None
        return self.collect(sequence, expected)

    def _wait_if_exited(self) -> None:
        if self.alive and self._has_exited(DYING_MS):
            deadline = time.monotonic_ns() + DEADLINES[WorkerState.FINISHING].nanoseconds
            self._events.run_until(lambda: not self.alive, deadline)

    # ------------------------------------------------------------ end

    def finish(self) -> None:
        """Ask the cell to end, or kill it if it cannot be asked; :meth:`wait_ended` waits."""
        if not self.alive or self.state is WorkerState.FINISHING:
            return
        if self.failure or self.state is WorkerState.SPAWNED:
            self.kill()
            return
        try:
            self._submit(self.FINISH, lambda reply: None, 0)
            self._move(WorkerEvent.FINISH)
        except VmmError:
            self.kill()

    def _release(self) -> None:
        super()._release()
        self._close_channel()
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None
        self._replies.clear()

    def close(self) -> None:
        """Release everything; the process must have ended or be about to."""
        self._release()
