"""A stand-in for the supervisor: a process that forks workers on request, and says how they ended."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ipc import descriptors
from ipc.channel import PairChannel
from ipc.errors import IpcError
from ipc.launch_plan import ROLE_DEVICE, ROLE_VCPU, LaunchPlan
from ipc.messages.records import Failed
from ipc.messages.supervisor import (
    SUPERVISOR,
    CellEnded,
    CreateMemory,
    MemoryCreated,
    SignalCell,
    Signalled,
    Spawn,
    Spawned,
)
from ipc.shared_memory import create_shared

#: What a forked worker runs: plan, its number, its end of the descriptor channel.
WorkerBody = Callable[[LaunchPlan, int, socket.socket], None]


class StandInSupervisor:
    """Forks workers on request and says how they ended. Runs in its own process; ``handlers`` change what it does.

    The n-th fork runs the n-th of ``workers``, those after the last one the last one.
    """

    def __init__(
        self,
        channel: socket.socket,
        plan: LaunchPlan,
        workers: Sequence[WorkerBody],
        script: Callable[[StandInSupervisor], None] | None,
    ) -> None:
        self.channel = PairChannel(channel, SUPERVISOR, plan.epoch)
        self.plan = plan
        self.workers = workers
        self.children: dict[int, tuple[int, int]] = {}  # pidfd → (worker, pid)
        self.device_cells: set[int] = set()  # the pids of those that are no workers
        self.spawns = 0
        self.handlers: dict[type, Callable[[Any, int], None]] = {
            Spawn: self.spawn,
            CreateMemory: self.create_memory,
            SignalCell: self.signal,
        }
        if script is not None:
            script(self)

    def run(self) -> None:
        try:
            while True:
                self.turn()
        except IpcError:
            pass  # the controller is gone
        for pidfd in self.children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def turn(self) -> None:
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        for pidfd in self.children:
            poll.register(pidfd, select.POLLIN)
        for descriptor, _ in poll.poll():
            if descriptor in self.children:
                self.reap(descriptor)
            elif descriptor == self.channel.fileno():
                envelope, owned = self.channel.receive()
                owned.close()
                assert envelope is not None
                self.handlers[type(envelope.message)](envelope.message, envelope.sequence)

    def fork(self, index: int) -> tuple[int, int, socket.socket]:
        """Fork a worker; returns pid, pidfd and the controller's end of its descriptor channel."""
        body = self.workers[min(self.spawns, len(self.workers) - 1)]
        self.spawns += 1
        ours, theirs = descriptors.channel_pair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self.channel.close()
            run_process(lambda: body(self.plan, index, theirs))
        theirs.close()
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = (index, pid)
        return pid, pidfd, ours

    def spawn(self, message: Spawn, sequence: int) -> None:
        pid, pidfd, ours = self.fork(message.worker)
        self.channel.send(Spawned(message.worker, pid), sequence, (pidfd, ours.fileno()))
        ours.close()

    def create_memory(self, message: CreateMemory, sequence: int) -> None:
        descriptor = create_shared("guest-memory", message.size)
        self.channel.send(MemoryCreated(message.size), sequence, (descriptor,))
        os.close(descriptor)

    def signal(self, message: SignalCell, sequence: int) -> None:
        for pidfd, child in self.children.items():
            if child == (message.worker, message.pid):
                signal.pidfd_send_signal(pidfd, message.signal)
        self.channel.send(Signalled(), sequence)

    def reap(self, pidfd: int) -> None:
        index, pid = self.children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
        wall = "seccomp" if number == signal.SIGSYS else ""
        role = ROLE_DEVICE if pid in self.device_cells else ROLE_VCPU
        self.channel.send(CellEnded(index, pid, code, number, wall, role=role))

    def refuse(self, message: Any, sequence: int) -> None:
        self.channel.send(Failed("supervisor.test", "The supervisor would rather not."), sequence)


def run_process(body: Callable[[], None]) -> None:
    """Run a forked process to its end; a traceback goes to standard error, as the tests show it when they fail."""
    faulthandler.disable()  # a signal that ends it is part of the test
    for number in (signal.SIGXFSZ, signal.SIGHUP):  # ignored by Python, and by nohup
        signal.signal(number, signal.SIG_DFL)
    try:
        body()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    os._exit(0)
