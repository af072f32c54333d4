"""The ZeroMQ channel between real processes, with honest, broken, dead and hostile peers.

libzmq's threads do not survive a fork, so the test process itself has no context: both sides are children.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from ipc import faults
from ipc.channel import HIGH_WATER_MARK, MAX_REFUSED, Channel
from ipc.errors import ChannelError
from ipc.messages import WORKER, Hello, Ping, Pong, SavedState, Welcome
from ipc.schema import MAX_FRAME_SIZE, Envelope, encode
from tests.unit.ipc import zmtp
from tests.unit.ipc.processes import PATIENCE_SECONDS, Child, open_descriptors

EPOCH = 0x1234_5678_9ABC
HELLO = Hello(0, 4711, 12, 12288, 1024)


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


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(tempfile.mkdtemp(prefix="cb-", dir="/tmp"))  # a socket's path has at most 107 bytes
    yield made
    made.close()


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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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
            wait_until(lambda: channel.receive(time.monotonic_ns()) is None and channel.counters.expired == 1)
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
            wait_until(lambda: count_sockets() == with_connection - 1)
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
            wait_until(lambda: try_send(channel, message))
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


def resident() -> int:
    """Return this process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# ---------------------------------------------------------------- hostile peers


def forged(chooser: random.Random) -> bytes:
    """Return a frame that must be refused."""
    good = encode(WORKER, Envelope(EPOCH, 1 << 40, 0, 0, HELLO))
    kind = chooser.randrange(6)
    if kind == 0:
        return chooser.randbytes(chooser.randrange(100))
    if kind == 1:
        return good[: chooser.randrange(len(good))]
    if kind == 2:
        return good + b"\0"
    if kind == 3:
        return encode(WORKER, Envelope(EPOCH ^ 1 << chooser.randrange(48), 1 << 40, 0, 0, HELLO))
    if kind == 4:
        return b"\xdd\xff\xff\xff\xff" * chooser.randrange(1, 1000)
    return encode(WORKER, Envelope(EPOCH, 1, 0, 0, HELLO))  # a number that was used


def test_forged_frames_are_refused_and_counted(place, seed):
    def control() -> list[int]:
        with controller(place) as channel:
            assert receive(channel).message == Ping()
            for _ in range(20):
                assert receive(channel).message == Pong("good")
            refused = channel.counters.refused
            with pytest.raises(ChannelError, match="in a row"):
                receive(channel)
            place.tell("done")
            return [refused, channel.counters.refused, channel.counters.received]

    def forge() -> None:
        """A raw libzmq PAIR socket with the right address and the wrong frames."""
        chooser = random.Random(seed)
        place.wait("bound")
        context = zmq.Context()
        raw = context.socket(zmq.PAIR)
        raw.connect(f"ipc://{place.path}")
        raw.send(encode(WORKER, Envelope(EPOCH, 1, 0, 0, Ping())))
        for number in range(2, 22):
            for _ in range(10):
                raw.send(forged(chooser))
            raw.send(encode(WORKER, Envelope(EPOCH, number, 0, 0, Pong("good"))))
        for _ in range(MAX_REFUSED):
            raw.send(forged(chooser))
        place.wait("done")
        context.destroy(0)

    with Child(control) as one, Child(forge) as two:
        assert one.join() == [200, 200 + MAX_REFUSED, 21]
        two.join()


def test_messages_in_parts_are_frames_of_their_own(place):
    """ZeroMQ's multipart messages mean nothing here: each part must be a frame."""

    def control() -> int:
        with controller(place) as channel:
            assert receive(channel).message == Pong("1")
            assert receive(channel).message == Pong("2")
            return channel.counters.malformed

    with Child(control) as one:
        place.wait("bound")
        with zmtp.handshake(place.path) as raw:
            frames = [encode(WORKER, Envelope(EPOCH, number, 0, 0, Pong(str(number)))) for number in (1, 2)]
            raw.sendall(zmtp.frame(frames[0], zmtp.MORE) + zmtp.frame(b"", zmtp.MORE) + zmtp.frame(frames[1]))
            assert one.join() == 1


def test_an_oversize_frame_ends_the_connection(place):
    def control() -> None:
        with controller(place) as channel:
            place.wait("done")
            assert channel.receive() is None
            assert channel.counters.refused == 0

    with Child(control) as one:
        place.wait("bound")
        for size in (MAX_FRAME_SIZE + 1, 1 << 31, 1 << 63, (1 << 64) - 1):
            with zmtp.handshake(place.path) as raw:
                header = bytes([zmtp.LONG]) + size.to_bytes(8, "big")
                assert ends(raw, header + bytes(1000)), f"a frame of {size} bytes is taken"
        place.tell("done")
        one.join()


def ends(raw: socket.socket, data: bytes) -> bool:
    """Send; True if the other side closes the connection in consequence."""
    if not zmtp.send_all_of(raw, data):
        return True
    try:
        while raw.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_a_second_peer_is_not_heard(place):
    def control() -> int:
        with controller(place) as channel:
            assert receive(channel).message == HELLO
            place.tell("connected")
            for number in range(50):
                channel.send(Ping())
                assert receive(channel).message == Pong(str(number))
            place.tell("done")
            place.tell("done")
            return channel.counters.refused

    def work() -> None:
        with worker(place) as channel:
            channel.send(HELLO)
            place.wait("go")
            for number in range(50):
                receive(channel)
                channel.send(Pong(str(number)))
            place.wait("done")

    def intrude() -> None:
        """libzmq as the intruder; a raw one does the same below."""
        with opened() as channel:
            channel.connect(place.path)
            with contextlib.suppress(ChannelError):
                for _ in range(HIGH_WATER_MARK):
                    channel.send(Pong("forged"))
            place.tell("go")
            place.wait("done")
            assert channel.receive() is None

    with Child(control) as one, Child(work) as two:
        place.wait("connected")
        with zmtp.handshake(place.path) as raw:
            zmtp.send_all_of(raw, zmtp.frame(encode(WORKER, Envelope(EPOCH, 1 << 30, 0, 0, Pong("forged")))))
            with Child(intrude) as three:
                assert one.join() == 0
                two.join()
                three.join()


def garbage(chooser: random.Random) -> bytes:
    """Return bytes that begin like ZMTP, more or less, and end before READY or within a broken one."""
    kind = chooser.randrange(7)
    good = zmtp.GREETING + zmtp.ready()
    if kind == 0:
        return chooser.randbytes(chooser.randrange(1, 300))
    if kind == 1:
        return good[: chooser.randrange(len(good))]
    if kind == 2:  # mutated
        changed = bytearray(good)
        for _ in range(chooser.randrange(1, 6)):
            changed[chooser.randrange(len(changed))] = chooser.randrange(256)
        return bytes(changed)
    if kind == 3:  # another version, another mechanism
        mechanism = chooser.choice((b"PLAIN", b"CURVE", b"GSSAPI", b"", b"NULL\0x"))
        version = bytes([chooser.randrange(256), chooser.randrange(256)])
        return zmtp.SIGNATURE + version + mechanism.ljust(20, b"\0") + bytes([chooser.randrange(2)]) + bytes(31)
    if kind == 4:  # another command instead of READY
        name = chooser.choice((b"ERROR", b"PING", b"HELLO", b"INITIATE", b"", b"SUBSCRIBE", b"JOIN"))
        return zmtp.GREETING + zmtp.command(name, chooser.randbytes(chooser.randrange(40)))
    if kind == 5:  # READY with broken properties
        data = chooser.randbytes(chooser.randrange(1, 60))
        return zmtp.GREETING + zmtp.command(b"READY", data)
    socket_type = chooser.choice((b"REQ", b"PUB", b"ROUTER", b"XSUB", b"pair", b"", b"PAIR" * 20))
    return zmtp.GREETING + zmtp.ready(socket_type)


OVER = encode(WORKER, Envelope(EPOCH, (1 << 64) - 1, 0, 0, Pong("over")))


def listen_until_over(place: Place) -> int:
    """Be a controller that hears any number of peers, one after the other; return what it refused."""
    with controller(place) as channel:
        while True:
            try:
                envelope = channel.receive()
            except ChannelError:
                continue  # the peer of the next connection is judged by itself
            if envelope is None:
                time.sleep(0.0005)
            elif envelope.message == Pong("over"):
                place.tell("done")
                return channel.counters.refused
            else:
                assert envelope.message == HELLO  # forged() has one that only a used number makes wrong


def say_over(place: Place) -> None:
    """Connect like a worker, until one is heard: a predecessor's connection may have to go first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not select.select([place.signal("done")], [], [], 0)[0]:
        assert time.monotonic() < deadline, "the controller does not hear the next worker"
        with zmtp.handshake(place.path) as raw:
            zmtp.send_all_of(raw, zmtp.frame(OVER))
            time.sleep(0.02)


@pytest.mark.soak("ipc")
def test_garbage_instead_of_a_handshake(place, scale, seed):
    """Whatever comes before the worker: the controller lives, nothing of it is a message, and the worker is heard."""
    chooser = random.Random(seed)
    with Child(lambda: listen_until_over(place)) as one:
        place.wait("bound")
        for _ in range(scale(300, 20_000)):
            with zmtp.connect(place.path) as raw:
                zmtp.send_all_of(raw, garbage(chooser))
        say_over(place)
        one.join()  # it may have refused a few: what does not begin with 0xFF is taken for ZMTP 1.0, without handshake


@pytest.mark.soak("ipc")
def test_garbage_after_a_handshake(place, scale, seed):
    """A worker that was taken over writes to its connection itself: frames are refused, or the connection ends."""
    chooser = random.Random(seed)
    with Child(lambda: listen_until_over(place)) as one:
        place.wait("bound")
        for _ in range(scale(100, 20_000)):
            with zmtp.handshake(place.path) as raw:
                zmtp.send_all_of(raw, traffic(chooser))
        say_over(place)
        assert one.join() > 0


def traffic(chooser: random.Random) -> bytes:
    """Return what a hostile peer writes once it is connected."""
    out = bytearray()
    for _ in range(chooser.randrange(1, 8)):
        body = chooser.randbytes(chooser.choice((0, 1, 5, 255, 256, 3000)))
        kind = chooser.randrange(5)
        if kind == 0:
            out += chooser.randbytes(chooser.randrange(1, 100))
        elif kind == 1:
            out += zmtp.frame(body, chooser.randrange(8))
        elif kind == 2:
            out += zmtp.frame(forged(chooser), chooser.choice((0, zmtp.MORE, zmtp.LONG)))
        elif kind == 3:
            name = chooser.choice((b"PING", b"PONG", b"READY", b"ERROR", b"SUBSCRIBE", b"CANCEL", b"", b"X" * 200))
            out += zmtp.command(name[:255], body[:50])
        else:
            out += bytes([chooser.randrange(8) | zmtp.LONG]) + chooser.randbytes(8)
    return bytes(out)


def test_an_endless_message_is_stopped_by_the_memory_limit_only(place):
    """ZMTP's "more" flag: libzmq gathers the parts of one message without any bound, whatever its water marks say.

    A hostile worker can so fill the controller's memory. What holds is the limit that the jailer sets on the cell's
    memory: the controller ends, or drops the connection, and the host keeps its memory (docs/formats/messages.md).
    """
    limit = 64 << 20

    def control() -> None:
        with controller(place) as channel:
            with open("/proc/self/status") as file:
                data = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
            resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open("/dev/null", os.O_WRONLY), 2)  # libzmq says that memory is exhausted, and aborts
            place.tell("connected")
            while channel.receive() is None:
                time.sleep(0.01)

    part = zmtp.frame(bytes(MAX_FRAME_SIZE), zmtp.MORE)
    sent = 0
    with Child(control) as one:
        place.wait("connected")
        with zmtp.handshake(place.path) as raw:
            while sent < 8 * limit and zmtp.send_all_of(raw, part):
                sent += len(part)
        assert sent < 8 * limit
        one.kill()
        assert one.wait() in (-signal.SIGABRT, -signal.SIGKILL)
    assert sent > limit // 2, "something else ended the connection: is the limit still needed?"


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("specification", "received", "refused"),
    [
        ("drop,after=1", [1, 3, 4, 5], 0),
        ("drop,after=1,count=2", [1, 4, 5], 0),
        ("duplicate,after=1", [1, 2, 3, 4, 5], 1),
        ("duplicate,count=0", [1, 2, 3, 4, 5], 5),
        ("reorder,after=1", [1, 3, 4, 5], 1),
        ("reorder,after=1,count=2", [1, 3, 4, 5], 1),
        ("reorder,count=0", [2, 4], 2),
        ("reorder,after=4", [1, 2, 3, 4], 0),
        ("truncate,after=2", [1, 2, 4, 5], 1),
        ("corrupt,after=2,seed=0", [1, 2, 4, 5], 1),
        ("delay,ms=1,count=0", [1, 2, 3, 4, 5], 0),
    ],
)
@pytest.mark.parametrize("point", ["channel.send", "channel.receive"])
def test_faults(place, point, specification, received, refused):
    """Numbers 1 … 5 are sent with a fault armed; they arrive changed as the fault says, whichever side has it."""

    def control() -> list[Any]:
        if point == "channel.receive":
            faults.arm((f"{point}={specification}",))
        with controller(place) as channel:
            place.wait("connected")
            arrived: list[int] = []
            while True:
                try:
                    envelope = receive_or_done(channel, place)
                except ChannelError:
                    return ["too many refused"]
                if envelope is None:
                    return [arrived, channel.counters.refused]
                arrived.append(int(envelope.message.state))

    def work() -> None:
        if point == "channel.send":
            faults.arm((f"{point}={specification}",))
        with worker(place) as channel:
            for number in range(1, 6):
                channel.send(Pong(str(number)))
            place.tell("connected")
            channel.close(linger_ms=10_000)

    with Child(control) as one:
        with Child(work) as two:
            two.join()
        place.tell("done")
        assert one.join() == [received, refused]


def receive_or_done(channel: Channel, place: Place) -> Envelope | None:
    """Return the next message; None when the sender has ended and everything it sent was looked at."""
    done = False
    while True:
        envelope = channel.receive()
        if envelope is not None or done:
            return envelope
        if select.select([place.signal("done")], [], [], 0)[0]:
            time.sleep(0.1)  # what the sender handed to the kernel before it ended passes libzmq's thread
            done = True
        time.sleep(0.001)


def test_a_held_frame_does_not_change_direction(place):
    """Reorder on both sides at once: each direction holds its own frame."""

    def control() -> list[str]:
        faults.arm(("channel.send=reorder", "channel.receive=reorder"))
        with controller(place) as channel:
            first = receive(channel).message.state  # the second that was sent
            channel.send(Ping())
            channel.send(Ping())
            place.wait("done")
            return [first, str(channel.counters.stale)]

    def work() -> list[int]:
        with worker(place) as channel:
            for state in ("a", "b", "c"):
                channel.send(Pong(state))
            sequence = receive(channel).sequence
            wait_until(lambda: channel.receive() is None and channel.counters.stale == 1)
            place.tell("done")
            return [sequence, channel.counters.stale]

    with Child(control) as one, Child(work) as two:
        assert two.join() == [2, 1]
        assert one.join()[0] == "b"


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("exit", 1)])
@pytest.mark.parametrize("point", ["channel.send", "channel.receive"])
def test_faults_that_end_the_process(place, point, action, status):
    def control() -> None:
        faults.arm((f"{point}={action}",))
        with controller(place) as channel:
            answer_hello(channel)

    def work() -> str:
        with worker(place) as channel:
            channel.send(HELLO)
            place.wait("done")
            return "alive"

    with Child(control) as one, Child(work) as two:
        assert one.wait() == status
        place.tell("done")
        assert two.join() == "alive"
