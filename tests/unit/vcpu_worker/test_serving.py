"""The control thread's loop over real channels, with the commands of a worker whose VM could not be made."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from base.lean_std import socket
from ipc.channel import Channel, PairChannel
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.records import WORKER, Failed
from ipc.messages.worker import Finish, Finished, Ping, Pong, ReadHostCpu, Resume
from ipc.schema import Envelope
from tests.harness.channels import HELLO
from tests.harness.processes import PATIENCE_SECONDS
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import KvmError
from vcpu_worker.refusal import Refusal
from vcpu_worker.serving import serve
from vcpu_worker.vcpu_thread import Completions

EPOCH = 7
REASON = KvmError("KVM_CREATE_VM", 12)


class Served:
    """A control thread that serves, and the controller's ends of its channels."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context(io_threads=1)
        self.channel = Channel(self._context, WORKER, EPOCH)
        self.channel.bind(str(directory / "vcpu-0"))
        self.descriptors, self._worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._worker_end.setblocking(False)
        self._completions = Completions()
        self._worker = Channel(self._context, WORKER, EPOCH)
        self._worker.connect(str(directory / "vcpu-0"))
        self._worker.send(HELLO)
        assert self._next().message == HELLO  # who binds can send as soon as who connects has
        self.codes: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        held = DescriptorSet(PairChannel(self._worker_end, DESCRIPTORS, EPOCH))
        self.codes.append(serve(Refusal(REASON), self._worker, held, self._completions, self._worker_end.fileno()))

    def ask(self, message: Any) -> Any:
        """Send a command; return its answer."""
        sequence = self.channel.send(message)
        envelope = self._next()
        assert envelope.reply_to == sequence
        return envelope.message

    def _next(self) -> Envelope:
        while True:
            envelope = self.channel.receive()
            if envelope is not None:
                return envelope
            assert select.select([self.channel.fileno()], [], [], PATIENCE_SECONDS)[0], "no answer"

    def ended(self) -> int:
        """Return the exit code."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        return self.codes[0]

    def close(self) -> None:
        self.descriptors.close()
        self._thread.join(PATIENCE_SECONDS)
        self._worker_end.close()
        self.channel.close(0)
        self._worker.close(0)
        self._completions.close()
        self._context.term()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    each = Served(tmp_path)
    yield each
    each.close()


def test_a_worker_without_a_vm_says_why_whatever_is_asked_and_finishes(served: Served) -> None:
    reason = Failed("worker.kvm", "KVM_CREATE_VM: Cannot allocate memory (os error 12)")
    assert served.ask(ReadHostCpu()) == reason
    assert served.ask(Resume()) == reason
    assert served.ask(Ping()) == Pong("created")
    assert served.ask(Finish()) == Finished()
    assert served.ended() == 0


def test_a_controller_that_is_gone_ends_the_loop(served: Served) -> None:
    assert served.ask(Ping()) == Pong("created")
    served.descriptors.close()
    assert served.ended() == 1
