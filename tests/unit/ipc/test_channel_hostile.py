"""The control channel with a hostile peer: forged frames, garbage at the level of ZMTP, intruders."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import signal
import socket
import time

import pytest
import zmq

from ipc.channel import HIGH_WATER_MARK, MAX_REFUSED
from ipc.errors import ChannelError
from ipc.messages.records import WORKER
from ipc.messages.worker import Ping, Pong
from ipc.schema import MAX_FRAME_SIZE, Envelope, encode
from tests.harness import zmtp
from tests.harness.channels import EPOCH, HELLO, Place, controller, opened, receive, worker
from tests.harness.processes import PATIENCE_SECONDS, Child

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
