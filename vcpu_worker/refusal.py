"""What a worker can be told whose VM could not be made: why not, and to finish."""

from __future__ import annotations

import select

from base import faults
from base.lean_typing import Any
from ipc.messages.worker import Finish, Finished, Ping, Pong
from vcpu_worker.errors import WorkerError
from vcpu_worker.lifecycle import State
from vcpu_worker.replies import Command, Reply, failed


class Refusal:
    """Answers every command (vcpu_worker.serving) with the reason; the controller learns it when it first asks."""

    def __init__(self, reason: WorkerError) -> None:
        self._answer = failed(reason)
        self._ended = False
        self._commands: dict[type[Any], Command] = {Ping: self._ping, Finish: self._finish}

    def find(self, kind: type[Any]) -> Command | None:
        """Return what answers a command of this class."""
        command: Command = self._commands.get(kind, self._refuse)
        return command

    def watch(self, poll: select.poll) -> None:
        """There is nothing to wait for."""

    def ready(self, descriptor: int) -> None:
        """There is nothing to wait for."""

    def due_ns(self) -> int:
        """Nothing is ever due."""
        return 0

    def act_if_due(self) -> None:
        """Nothing is ever due."""

    def has_ended(self) -> bool:
        """Tell whether the worker has finished."""
        return self._ended

    def _refuse(self, command: Any, reply: Reply) -> None:
        reply(self._answer)

    def _ping(self, command: Ping, reply: Reply) -> None:
        reply(Pong(State.CREATED.value))

    def _finish(self, command: Finish, reply: Reply) -> None:
        faults.visit("vcpu.finish")
        reply(Finished())
        self._ended = True
