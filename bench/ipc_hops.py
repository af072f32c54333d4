"""What a hop between two processes costs, next to a bare eventfd ping-pong in the same run.

    python -m bench.ipc_hops [ROUNDS]

Ring post: an entry that nobody waits for, with the consumer awake (no doorbell) and asleep (one doorbell each).
Ring call: a synchronous exit; the consumer lingers for the next one, or sleeps by the protocol in between. ZeroMQ
ping: a command and its reply over ipc.channel.

The two processes of a hop run on different CPUs, as a running vCPU and its controller do (left to itself the
scheduler may put an idle pair on one, where a wake-up is cheap). The kinds take turns, several times over, so that a
busy moment of the machine hits all alike; the figures are medians over the turns. Read the ratios: the absolute
times depend on how the machine leaves its idle states.
"""

from __future__ import annotations

import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Protocol

import zmq

from ipc import exit_ring
from ipc.channel import Channel
from ipc.exit_ring import ENTRY_COUNT, RING_SIZE, ExitRingConsumer, ExitRingProducer
from ipc.messages.records import WORKER
from ipc.messages.worker import Ping, Pong
from ipc.shared_memory import create_shared, fence, map_shared

ROUNDS = 2_000
TURNS = 9
CPUS = sorted(os.sched_getaffinity(0))


class Peer:
    """A forked process for one kind of hop; killed at the end."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.sched_setaffinity(0, {CPUS[-1]})
                function()
            finally:
                os._exit(1)

    def end(self) -> None:
        """End the process."""
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


class Kind(Protocol):
    """One kind of hop."""

    name: str
    peer: Peer | None

    def run(self, rounds: int) -> None:
        """Make ``rounds`` hops."""


class EventfdPingPong:
    """The yardstick: one eventfd each way, nothing else."""

    name = "eventfd ping-pong"

    def __init__(self) -> None:
        self.there, self.back = os.eventfd(0), os.eventfd(0)
        self.peer: Peer | None = Peer(self._answer)

    def _answer(self) -> None:
        while True:
            os.eventfd_read(self.there)
            os.eventfd_write(self.back, 1)

    def run(self, rounds: int) -> None:
        """Make ``rounds`` round trips."""
        there, back = self.there, self.back
        for _ in range(rounds):
            os.eventfd_write(there, 1)
            os.eventfd_read(back)


class Ring:
    """A ring whose consumer is another process: it sleeps by the protocol, lingering or not."""

    def __init__(self, linger: bool) -> None:
        self.descriptor = create_shared("exit-ring", RING_SIZE)
        exit_ring.initialise(map_shared(self.descriptor, RING_SIZE))
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.completion = os.eventfd(0, os.EFD_NONBLOCK)
        self.linger = linger
        self.peer: Peer | None = Peer(self._consume)
        self.producer = ExitRingProducer(map_shared(self.descriptor, RING_SIZE), self.doorbell, self.completion)

    def _consume(self) -> None:
        consumer = ExitRingConsumer(map_shared(self.descriptor, RING_SIZE), self.completion)
        epoll = select.epoll()
        epoll.register(self.doorbell, select.EPOLLIN)
        while True:
            entry = consumer.take()
            if entry is not None:
                consumer.complete(0x60)
            elif not (self.linger and consumer.linger()) and consumer.sleep():
                epoll.poll()
                os.eventfd_read(self.doorbell)
                consumer.awake()


class RingCall(Ring):
    """A synchronous exit; the controller's executor lingers for the next one."""

    name = "ring call"

    def __init__(self) -> None:
        super().__init__(linger=True)

    def run(self, rounds: int) -> None:
        """Make ``rounds`` calls."""
        call, applied = self.producer.call, self.producer.applied
        for _ in range(rounds):
            call(exit_ring.KIND_PIO_READ, 0x60, 1, 0)
            applied()


class RingCallAsleep(Ring):
    """A synchronous exit that finds the controller asleep (the guest's first one in a while)."""

    name = "ring call, consumer asleep"

    def __init__(self) -> None:
        super().__init__(linger=False)

    run = RingCall.run


class RingPostAsleep:
    """A posted exit that rings the doorbell; the consumer executes nothing, so that only the poster is measured."""

    name = "ring post, doorbell each"
    asleep = exit_ring.ASLEEP

    def __init__(self) -> None:
        self.descriptor = create_shared("exit-ring", RING_SIZE)
        buffer = map_shared(self.descriptor, RING_SIZE)
        exit_ring.initialise(buffer)
        self.words = memoryview(buffer)[:4096].cast("Q")
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.producer = ExitRingProducer(buffer, self.doorbell, os.eventfd(0, os.EFD_NONBLOCK))
        self.peer: Peer | None = None

    def run(self, rounds: int) -> None:
        """Post ``rounds`` entries into a ring that always has room."""
        words, post = self.words, self.producer.post
        words[exit_ring.WORD_ASLEEP] = self.asleep
        for _ in range(rounds // ENTRY_COUNT + 1):
            words[exit_ring.WORD_DONE] = words[exit_ring.WORD_POSTED]
            for _ in range(min(rounds, ENTRY_COUNT)):
                post(exit_ring.KIND_PIO_WRITE, 0x3F8, 1, 0x41)


class RingPost(RingPostAsleep):
    """A posted exit while the consumer is awake."""

    name = "ring post"
    asleep = exit_ring.AWAKE


class ZeroMqPing:
    """A command and its reply on a worker's control channel."""

    name = "ZeroMQ ping"

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="cb-bench-")
        self.path = f"{self.directory.name}/vcpu-0"
        bound_reader, self.bound = os.pipe()
        self.peer: Peer | None = Peer(lambda: self._answer(bound_reader))
        self.channel = Channel(zmq.Context(io_threads=1), WORKER, 1)
        self.channel.bind(self.path)
        os.write(self.bound, b"1")
        self._receive(self.channel)
        self.channel.unlink()

    def _answer(self, bound: int) -> None:
        os.read(bound, 1)
        channel = Channel(zmq.Context(io_threads=1), WORKER, 1)
        channel.connect(self.path)
        channel.send(Pong("hello"))
        while True:
            channel.send(Pong("running"), reply_to=self._receive(channel))

    @staticmethod
    def _receive(channel: Channel) -> int:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while (envelope := channel.receive()) is None:
            poll.poll()
        return envelope.sequence

    def run(self, rounds: int) -> None:
        """Make ``rounds`` round trips."""
        for _ in range(rounds):
            self.channel.send(Ping())
            self._receive(self.channel)


class Fence:
    """The barrier alone."""

    name = "fence()"
    peer: Peer | None = None

    def run(self, rounds: int) -> None:
        """Call it ``rounds`` times."""
        for _ in range(rounds):
            fence()


def main(rounds: int = ROUNDS) -> int:
    """Measure and print."""
    os.sched_setaffinity(0, {CPUS[0]})
    # The processes are forked before the first ZeroMQ thread exists in this one.
    kinds: list[Kind] = [
        EventfdPingPong(),
        RingCall(),
        RingCallAsleep(),
        RingPost(),
        RingPostAsleep(),
        Fence(),
        ZeroMqPing(),
    ]
    times: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for turn in range(TURNS + 1):
        for kind in kinds:
            started = time.perf_counter_ns()
            kind.run(rounds)
            if turn:  # the first warms up
                times[kind.name].append((time.perf_counter_ns() - started) / rounds)
    yardstick = statistics.median(times[EventfdPingPong.name])
    print(f"{'':28} {'µs':>8} {'lowest':>8} {'highest':>8}  ratio to an eventfd round trip")
    for name, values in times.items():
        median = statistics.median(values)
        figures = "".join(f" {value / 1e3:8.2f}" for value in (median, min(values), max(values)))
        print(f"{name:28}{figures}  {median / yardstick:6.3f}")
    for kind in kinds:
        if kind.peer is not None:
            kind.peer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
