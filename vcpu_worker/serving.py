"""The control thread's loop: takes commands, has them carried out, sends what is replied. Never waits for a vCPU."""

from __future__ import annotations

import select
import time

from base.exit_codes import GENERIC_ERROR, OK
from base.lean_typing import Any, Protocol
from ipc.channel import Channel
from ipc.errors import IpcError
from ipc.messages.records import Failed
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import WorkerError
from vcpu_worker.replies import Command, failed
from vcpu_worker.vcpu_thread import Completions


class Commands(Protocol):
    """What a worker can be told, and what it has to do without being told."""

    def find(self, kind: type[Any]) -> Command | None:
        """Return what carries out a command of this class; None: it is no command now."""

    def watch(self, poll: select.poll) -> None:
        """Take what the loop waits with, to register what else is to be waited for."""

    def ready(self, descriptor: int) -> None:
        """Something has happened on a descriptor; it may be none of what was registered."""

    def due_ns(self) -> int:
        """Return when act_if_due() has something to do (CLOCK_MONOTONIC); 0: not at all."""

    def act_if_due(self) -> None:
        """Do what is due."""

    def has_ended(self) -> bool:
        """Tell whether the worker has finished."""


def serve(
    commands: Commands,
    channel: Channel,
    descriptors: DescriptorSet,
    completions: Completions,
    descriptor_socket: int,
) -> int:
    """Serve until the end; return the exit code of the process. Raises IpcError when the channel fails."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(descriptor_socket, select.POLLIN)
    poll.register(completions.eventfd, select.POLLIN)
    commands.watch(poll)
    while True:
        # ZeroMQ's descriptor is edge-triggered: read until there is nothing after everything that may have sent.
        while not commands.has_ended() and (completions.deliver() or _receive(commands, channel)):
            pass
        if commands.has_ended():
            return OK
        for descriptor, events in poll.poll(_timeout_ms(commands)):
            if descriptor == descriptor_socket and (events & ~select.POLLIN or not descriptors.receive()):
                return GENERIC_ERROR  # the controller is gone
            commands.ready(descriptor)
        commands.act_if_due()


def _receive(commands: Commands, channel: Channel) -> bool:
    """Carry out one command; False if none has come."""
    envelope = channel.receive(time.monotonic_ns())
    if envelope is None:
        return False
    sequence = envelope.sequence

    def reply(message: Any) -> None:
        channel.send(message, reply_to=sequence)

    kind = type(envelope.message)
    command = commands.find(kind)
    if command is None:
        reply(Failed("worker.state", f"{kind.__name__} is not a command"))
        return True
    try:
        command(envelope.message, reply)
    except (WorkerError, IpcError) as error:
        reply(failed(error))
    return True


def _timeout_ms(commands: Commands) -> int | None:
    due = commands.due_ns()
    return max(0, (due - time.monotonic_ns() + 999_999) // 1_000_000) if due else None
