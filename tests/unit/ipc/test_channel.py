"""The ZeroMQ channel between real processes, with honest peers, dead ones, and such that do not read.

libzmq's threads do not survive a fork, so the test process itself has no context: both sides are children.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import time
from typing import Any

import pytest
import zmq

from ipc.channel import HIGH_WATER_MARK, Channel
from ipc.errors import ChannelError
from ipc.messages.records import WORKER
from ipc.messages.worker import Ping, Pong, SavedState
from ipc.schema import MAX_FRAME_SIZE
from tests.harness import zmtp
from tests.harness.channels import (
    EPOCH,
    HELLO,
    answer_hello,
    controller,
    count_sockets,
    greet,
    opened,
    receive,
    resident,
    send_until_refused,
    worker,
)
from tests.harness.processes import PATIENCE_SECONDS, Child, open_descriptors, wait_for

# ---------------------------------------------------------------- honest peers


def test_hello_and_a_thousand_commands(place):
    commands = 1_000

    def control() -> list[int]:
        with controller(place) as channel:
            assert stat.S_ISSOCK(os.stat(place.path).st_mode)
            answer_hello(channel)
            assert os.listdir(place.directory) == []
            for number in range(commands):
                sequence = channel.send(Ping())
                pong = receive(channel)
                assert (pong.reply_to, pong.message) == (sequence, Pong(str(number)))
            channel.send(Ping(), deadline=1)
            counters = channel.counters
            place.wait("done")
            return [counters.sent, counters.received, counters.refused]

    def work() -> list[int]:
        with worker(place) as channel:
            greet(channel)
            for number in range(commands):
                channel.send(Pong(str(number)), reply_to=receive(channel).sequence)
            wait_for(lambda: channel.receive(time.monotonic_ns()) is None and channel.counters.expired == 1)
            place.tell("done")
            counters = channel.counters
            return [counters.sent, counters.received, counters.refused]

    with Child(control) as one, Child(work) as two:
        assert one.join() == [commands + 2, commands + 1, 0]
        assert two.join() == [commands + 1, commands + 1, 1]
    assert os.listdir(place.directory) == []


def test_many_messages_at_once_in_both_directions(place):
    """More than the edge-triggered descriptor tells of one by one.

    Each side may be one burst ahead of the other, and libzmq gives room back in portions of half the mark.
    """
    burst = HIGH_WATER_MARK // 4

    def exchange(channel: Channel) -> None:
        for round_number in range(20):
            for number in range(burst):
                channel.send(Pong(f"{round_number} {number}"))
            for number in range(burst):
                assert receive(channel).message == Pong(f"{round_number} {number}")

    def control() -> None:
        with controller(place) as channel:
            answer_hello(channel)
            exchange(channel)
            place.wait("done")

    def work() -> None:
        with worker(place) as channel:
            greet(channel)
            exchange(channel)
            place.tell("done")

    with Child(control) as one, Child(work) as two:
        one.join()
        two.join()


def test_the_largest_message_passes(place):
    message = SavedState(0, 1, bytes(128 << 10))

    def control() -> None:
        with controller(place) as channel:
            answer_hello(channel)
            assert receive(channel).message == message
            place.tell("done")

    def work() -> None:
        with worker(place) as channel:
            greet(channel)
            channel.send(message)
            place.wait("done")

    with Child(control) as one, Child(work) as two:
        one.join()
        two.join()


def test_every_descriptor_is_close_on_exec(place):
    def inheritable(before: dict[int, str]) -> list[str]:
        opened_since = {number: target for number, target in open_descriptors().items() if number not in before}
        assert any("eventpoll" in target for target in opened_since.values())
        found = []
        for number, target in opened_since.items():
            with contextlib.suppress(OSError):  # libzmq's thread has closed it meanwhile
                if os.get_inheritable(number):
                    found.append(target)
        return found

    def control() -> list[str]:
        before = open_descriptors()
        with controller(place) as channel:
            answer_hello(channel)
            place.wait("go")
            place.tell("done")
            assert len(open_descriptors()) > len(before)
            return inheritable(before)

    def work() -> list[str]:
        before = open_descriptors()
        with worker(place) as channel:
            greet(channel)
            place.tell("go")
            place.wait("done")
            return inheritable(before)

    with Child(control) as one, Child(work) as two:
        assert one.join() == []
        assert two.join() == []


def test_close_leaves_neither_descriptors_nor_the_path(place):
    def control() -> None:
        before = open_descriptors()
        context = zmq.Context(io_threads=1)
        channel = Channel(context, WORKER, EPOCH)
        channel.bind(place.path)
        channel.close()
        assert os.listdir(place.directory) == []
        channel.close()
        channel.unlink()
        context.term()
        assert open_descriptors() == before

    with Child(control) as child:
        child.join()


def test_unlink_does_not_mind_that_the_path_is_gone(place):
    def control() -> None:
        with controller(place) as channel:
            os.unlink(place.path)
            channel.unlink()
            channel.unlink()

    with Child(control) as child:
        child.join()


@pytest.mark.parametrize("name", ["missing/vcpu-0", "x" * 120])
def test_a_path_that_cannot_be_bound(place, name):
    def control() -> None:
        with opened() as channel, pytest.raises(ChannelError, match="cannot bind"):
            channel.bind(f"{place.directory}/{name}")

    with Child(control) as child:
        child.join()


@pytest.mark.parametrize("welcome", [True, False])
def test_only_its_user_reaches_the_controller(place, welcome):
    """The endpoint of a cell that is another user: open to everybody by its mode, by the kernel's word to that user."""

    def control() -> list[str]:
        before = os.umask(0o027)
        os.chmod(place.directory, 0o711)
        with opened() as channel:
            channel.bind(place.path, (4321, 1234 if welcome else 1235))
            assert stat.S_IMODE(os.stat(place.path).st_mode) == 0o777
            assert os.umask(before) == 0o027
            place.tell("bound")
            if welcome:
                answer_hello(channel)
            place.wait("done")
            return [] if (received := channel.receive()) is None else [str(received)]

    def work() -> None:
        os.setgroups([])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        with worker(place) as channel:
            if welcome:
                greet(channel)
            else:
                send_until_refused(channel, 0.001)  # whom it let go it does not hear
            place.tell("done")

    with Child(control) as controlling, Child(work) as working:
        working.join()
        assert controlling.join() == []


def test_nobody_listens(place):
    """The connection fails in the background and is not tried again; sending says so at last, receiving never ends
    in an error."""

    def work() -> int:
        with opened() as channel:
            channel.connect(place.path)
            sent = send_until_refused(channel)
            assert channel.receive() is None
            return sent

    with Child(work) as child:
        assert child.join() <= HIGH_WATER_MARK


# ---------------------------------------------------------------- peers that end


def test_a_dead_worker(place):
    """Its last messages are delivered, receiving finds nothing more, sending says at once that it is gone."""

    def control() -> None:
        with controller(place) as channel:
            answer_hello(channel)
            place.wait("done")
            for number in range(10):
                assert receive(channel).message == Pong(str(number))
            os.kill(victim.pid, signal.SIGKILL)
            send_until_refused(channel, pause=0.001)
            assert channel.receive() is None
            with pytest.raises(ChannelError):
                channel.send(Ping())

    def work() -> None:
        with worker(place) as channel:
            greet(channel)
            for number in range(10):
                channel.send(Pong(str(number)))
            place.tell("done")
            time.sleep(PATIENCE_SECONDS)

    with Child(work) as victim, Child(control) as one:
        one.join()
        assert victim.wait() == -signal.SIGKILL


def test_a_dead_controller_is_not_looked_for(place):
    """Under its filter the worker would die of a second socket(2): there is no reconnection, at no time."""

    def control() -> None:
        with controller(place) as channel:
            answer_hello(channel)
            time.sleep(PATIENCE_SECONDS)

    def work() -> int:
        with worker(place) as channel:
            greet(channel)
            assert count_sockets() >= 1
            with_connection = count_sockets()
            os.kill(victim.pid, signal.SIGKILL)
            wait_for(lambda: count_sockets() == with_connection - 1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(place.path)
                listener.listen()
                send_until_refused(channel)
                assert channel.receive() is None
                ready, _, _ = select.select([listener], [], [], 0.5)
                return len(ready)

    with Child(control) as victim, Child(work) as child:
        assert child.join() == 0
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("by", ["kill", "close"])
def test_a_new_channel_for_the_next_worker(place, by):
    """A channel serves one peer for life; after its end the same path is bound anew."""

    def control() -> None:
        context = zmq.Context(io_threads=1)
        first_channel = Channel(context, WORKER, EPOCH)
        first_channel.bind(place.path)
        place.tell("bound")
        place.wait("go")
        first_channel.close()
        assert os.listdir(place.directory) == []
        with opened(context) as channel:
            channel.bind(place.path)
            place.tell("bound")
            answer_hello(channel)
            place.wait("done")

    def first() -> None:
        with worker(place) as channel:
            channel.send(HELLO)
            place.tell("connected")
            if by == "kill":
                time.sleep(PATIENCE_SECONDS)

    def second() -> None:
        with worker(place) as channel:
            greet(channel)
            place.tell("done")

    with Child(control) as one:
        with Child(first) as victim:
            place.wait("connected")
            if by == "kill":
                victim.kill()
            victim.wait()
        place.tell("go")
        with Child(second) as two:
            two.join()
        one.join()


# ---------------------------------------------------------------- peers that do not read


def test_a_peer_that_does_not_read_is_failed_not_buffered(place):
    """A libzmq peer takes its own high-water mark; after that, sending fails instead of growing our memory."""
    message = SavedState(0, 1, bytes(64 << 10))

    def control() -> list[int]:
        with controller(place) as channel:
            answer_hello(channel)
            before = resident()
            sent = fill(channel, message)
            grown = resident() - before
            place.tell("done")
            return [sent, grown]

    def work() -> None:
        with worker(place) as channel:
            greet(channel)
            place.wait("done")

    with Child(control) as one, Child(work) as two:
        sent, grown = one.join()
        two.join()
    assert HIGH_WATER_MARK <= sent <= 2 * HIGH_WATER_MARK + 16
    assert grown < 32 << 20


def test_a_peer_that_does_not_even_take_bytes(place):
    """A raw peer that never calls recv(2)."""
    message = SavedState(0, 1, bytes(64 << 10))

    def control() -> list[int]:
        with controller(place) as channel:
            place.wait("connected")
            wait_for(lambda: try_send(channel, message))
            before = resident()
            return [fill(channel, message), resident() - before]

    with Child(control) as one:
        place.wait("bound")
        with zmtp.handshake(place.path):
            place.tell("connected")
            sent, grown = one.join()
    assert sent <= HIGH_WATER_MARK + 16
    assert grown < 32 << 20


def test_a_peer_that_floods_is_held_back_by_the_kernel(place):
    """While the controller does not read, its high-water mark stops the flood at the socket."""

    def control() -> int:
        with controller(place) as channel:
            before = resident()
            place.wait("done")
            grown = resident() - before
            with pytest.raises(ChannelError, match="in a row"):
                receive(channel)
            return grown

    flood = zmtp.frame(bytes(MAX_FRAME_SIZE))
    with Child(control) as one:
        place.wait("bound")
        with zmtp.handshake(place.path) as raw:
            raw.setblocking(False)
            sent, idle_since = 0, time.monotonic()
            while time.monotonic() - idle_since < 1 and sent < 256 << 20:
                try:
                    sent += raw.send(flood)
                    idle_since = time.monotonic()
                except BlockingIOError:
                    time.sleep(0.01)
            place.tell("done")
            grown = one.join()
    assert sent < (HIGH_WATER_MARK + 16) * MAX_FRAME_SIZE
    assert grown < (HIGH_WATER_MARK + 16) * MAX_FRAME_SIZE


def try_send(channel: Channel, message: Any) -> bool:
    try:
        channel.send(message)
    except ChannelError:
        return False
    return True


def fill(channel: Channel, message: Any) -> int:
    """Send until it fails for good; return how many were taken."""
    sent = 0
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        if try_send(channel, message):
            sent += 1
            assert sent < 10 * HIGH_WATER_MARK, "nothing holds the sender back"
            quiet_since = time.monotonic()
        else:
            time.sleep(0.01)  # the I/O thread may still be moving frames to the kernel
    return sent
