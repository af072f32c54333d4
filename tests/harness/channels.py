"""Both ends of a control channel in processes of their own, and their honest behaviour, for tests."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import time
from collections.abc import Iterator
from typing import Any

import zmq

from ipc.channel import Channel
from ipc.errors import ChannelError
from ipc.messages.records import WORKER
from ipc.messages.worker import Hello, Ping, Welcome
from ipc.schema import Envelope
from tests.harness.processes import PATIENCE_SECONDS, open_descriptors

EPOCH = 0x1234_5678_9ABC
HELLO = Hello(0, 4711, 12, 12288, 1024, 32764)


class Place:
    """A private directory with the endpoint's path, and a signal "go on" between the test and its children."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/vcpu-0"
        self._signals = {
            name: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE) for name in ("bound", "connected", "go", "done")
        }

    def signal(self, name: str) -> int:
        """Return the eventfd called ``name``; those that a test uses are made before its forks."""
        return self._signals[name]

    def tell(self, name: str) -> None:
        os.eventfd_write(self.signal(name), 1)

    def wait(self, name: str) -> None:
        descriptor = self.signal(name)
        ready, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
        assert ready, f"nobody said {name!r}"
        os.eventfd_read(descriptor)

    def close(self) -> None:
        for descriptor in self._signals.values():
            os.close(descriptor)
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def opened(context: zmq.Context[Any] | None = None) -> Iterator[Channel]:
    """Open a channel with a context of its own."""
    context = context or zmq.Context(io_threads=1)
    channel = Channel(context, WORKER, EPOCH)
    try:
        yield channel
    finally:
        channel.close()
        context.term()


@contextlib.contextmanager
def controller(place: Place) -> Iterator[Channel]:
    """The binding side, in a child."""
    with opened() as channel:
        channel.bind(place.path)
        place.tell("bound")
        yield channel


@contextlib.contextmanager
def worker(place: Place) -> Iterator[Channel]:
    """The connecting side, in a child."""
    place.wait("bound")
    with opened() as channel:
        channel.connect(place.path)
        yield channel


def receive(channel: Channel) -> Envelope:
    """Wait for the next message, as an event loop does: the descriptor is edge-triggered."""
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    while (envelope := channel.receive()) is None:
        assert poller.poll(PATIENCE_SECONDS * 1000), "no message came"
    return envelope


def greet(channel: Channel) -> None:
    """The worker's HELLO and WELCOME."""
    sequence = channel.send(HELLO)
    welcome = receive(channel)
    assert (welcome.reply_to, welcome.message) == (sequence, Welcome())


def answer_hello(channel: Channel) -> None:
    """The controller's side of it."""
    hello = receive(channel)
    assert hello.message == HELLO
    channel.unlink()
    channel.send(Welcome(), reply_to=hello.sequence)


def send_until_refused(channel: Channel, pause: float = 0) -> int:
    """Send until the channel says that nobody reads; return how many messages it took."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    sent = 0
    while time.monotonic() < deadline:
        try:
            channel.send(Ping())
        except ChannelError:
            return sent
        sent += 1
        time.sleep(pause)
    raise AssertionError("the channel never said that its peer is gone")


def count_sockets() -> int:
    """Return how many sockets this process has."""
    return sum(target.startswith("socket:") for target in open_descriptors().values())


def resident() -> int:
    """Return this process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
