"""Descriptors over socket pairs: they arrive, what is not taken is closed, what is not asked for never comes in."""

from __future__ import annotations

import array
import os
import resource
import socket

import pytest

from ipc import descriptors
from ipc.channel import MAX_REFUSED, PairChannel
from ipc.descriptors import MAX_DESCRIPTORS, OwnedDescriptors
from ipc.errors import ChannelError, DescriptorError
from ipc.messages.supervisor import SUPERVISOR, MemoryCreated, Signalled
from ipc.schema import MAX_FRAME_SIZE, Envelope, encode
from tests.harness.processes import Child, open_descriptors

EPOCH = 7


@pytest.fixture
def pair():
    ours, theirs = descriptors.channel_pair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(autouse=True)
def no_descriptor_leaks(pair):
    before = open_descriptors()
    yield
    assert open_descriptors().items() <= before.items()


def pipes(count: int) -> list[int]:
    """Return ``count`` descriptors to pass on, each of an object of its own."""
    return [os.eventfd(index, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for index in range(1, count + 1)]


def send_and_forget(channel: socket.socket, frame: bytes, count: int) -> None:
    """Send fresh descriptors that the sender closes at once."""
    fresh = pipes(count)
    descriptors.send(channel, frame, fresh)
    for descriptor in fresh:
        os.close(descriptor)


def test_frame_without_descriptors(pair):
    ours, theirs = pair
    descriptors.send(ours, b"hello")
    frame, owned = descriptors.receive(theirs)
    assert (frame, len(owned)) == (b"hello", 0)


@pytest.mark.parametrize("count", [1, 2, 3, 8, MAX_DESCRIPTORS])
def test_descriptors_arrive_in_order(pair, count):
    ours, theirs = pair
    send_and_forget(ours, b"x", count)
    frame, owned = descriptors.receive(theirs, count)
    assert frame == b"x"
    assert len(owned) == count
    for expected in range(1, count + 1):
        descriptor = owned.take()
        assert not os.get_inheritable(descriptor)
        assert os.eventfd_read(descriptor) == expected
        os.close(descriptor)
    with pytest.raises(DescriptorError, match="fewer"):
        owned.take()


def test_what_is_not_taken_is_closed(pair):
    ours, theirs = pair
    send_and_forget(ours, b"x", 5)
    before = open_descriptors()
    _, owned = descriptors.receive(theirs, 5)
    with owned:
        taken = owned.take()
        assert len(open_descriptors()) == len(before) + 5
    assert len(open_descriptors()) == len(before) + 1
    assert len(owned) == 0
    owned.close()
    os.close(taken)


@pytest.mark.parametrize(
    ("sent", "maximum"), [(1, 0), (2, 1), (3, 1), (3, 2), (64, 63), (64, 1), (64, 0), (2, 0), (4, 3), (5, 3)]
)
def test_more_descriptors_than_expected_are_refused(pair, sent, maximum):
    """With and without MSG_CTRUNC: room for an odd number of descriptors holds one more."""
    ours, theirs = pair
    send_and_forget(ours, b"x", sent)
    before = open_descriptors()
    with pytest.raises(DescriptorError):
        descriptors.receive(theirs, maximum)
    assert open_descriptors() == before
    descriptors.send(ours, b"next")  # the channel itself is in order
    assert descriptors.receive(theirs)[0] == b"next"


def test_two_sets_in_one_message_are_refused(pair):
    """A hostile sender splits its descriptors over several control messages."""
    ours, theirs = pair
    fresh = pipes(4)
    half = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fresh[index : index + 2])) for index in (0, 2)]
    ours.sendmsg([b"x"], half)
    for descriptor in fresh:
        os.close(descriptor)
    with pytest.raises(DescriptorError):
        descriptors.receive(theirs, 2)


def test_credentials_are_no_descriptors(pair):
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.send(b"x")
    try:
        frame, owned = descriptors.receive(theirs, 8)
    except DescriptorError:
        return
    assert (frame, len(owned)) == (b"x", 0)


def test_an_oversize_frame_is_refused_with_its_descriptors(pair):
    ours, theirs = pair
    for side in pair:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_FRAME_SIZE)
    fresh = pipes(1)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fresh))]
    frame = bytes(ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 4096)
    assert len(frame) > MAX_FRAME_SIZE, "the system's wmem_max is too small for this test"
    ours.sendmsg([frame], rights)
    os.close(fresh[0])
    with pytest.raises(DescriptorError, match="cut"):
        descriptors.receive(theirs, 1)


def test_a_frame_larger_than_the_socket_buffer_is_an_error_of_the_sender(pair):
    ours, _ = pair
    with pytest.raises(DescriptorError, match=r"Message too l(ong|arge)"):
        descriptors.send(ours, bytes(8 << 20))


def test_the_sender_keeps_its_rules(pair):
    ours, _ = pair
    with pytest.raises(AssertionError):
        descriptors.send(ours, b"")
    with pytest.raises(AssertionError):
        descriptors.send(ours, b"x", [0] * (MAX_DESCRIPTORS + 1))
    with pytest.raises(DescriptorError, match="Bad file descriptor"):
        descriptors.send(ours, b"x", [9999])


def test_a_closed_peer():
    ours, theirs = descriptors.channel_pair()
    theirs.close()
    with pytest.raises(DescriptorError, match="Broken pipe"):
        descriptors.send(ours, b"x")
    assert descriptors.receive(ours)[0] == b""
    ours.close()
    with pytest.raises(DescriptorError):
        descriptors.receive(ours)


def test_what_was_sent_before_the_peer_closed_is_still_there():
    ours, theirs = descriptors.channel_pair()
    send_and_forget(ours, b"last", 1)
    ours.close()
    frame, owned = descriptors.receive(theirs, 1)
    assert (frame, len(owned)) == (b"last", 1)
    owned.close()
    assert descriptors.receive(theirs, 1)[0] == b""
    theirs.close()


def test_a_peer_that_dies_with_our_message_unread_is_a_closed_peer():
    """The kernel reports ECONNRESET to the survivor then."""
    ours, theirs = descriptors.channel_pair()
    descriptors.send(ours, b"unread")
    theirs.close()
    assert descriptors.receive(ours)[0] == b""
    ours.close()


def test_an_unread_descriptor_is_closed_with_the_channel():
    ours, theirs = descriptors.channel_pair()
    reader, writer = os.pipe()
    descriptors.send(ours, b"x", [writer])
    os.close(writer)
    theirs.close()
    assert os.read(reader, 1) == b""  # the last writer is gone
    os.close(reader)
    ours.close()


def test_nothing_there_on_a_non_blocking_channel(pair):
    ours, theirs = pair
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        descriptors.receive(theirs, 1)
    ours.setblocking(False)
    outcome = ""
    for _ in range(100_000):
        try:
            descriptors.send(ours, b"x" * 1000)
        except DescriptorError as error:
            outcome = str(error)
            break
    assert "temporarily unavailable" in outcome


def test_channels_are_close_on_exec(pair):
    assert not any(os.get_inheritable(side.fileno()) for side in pair)


def test_owned_descriptors_of_nothing():
    owned = OwnedDescriptors()
    owned.close()
    with owned, pytest.raises(DescriptorError):
        owned.take()


def test_descriptors_work_in_the_receiver(pair):
    """Between two processes: what is written to the passed pipe by one is read by the other."""
    ours, theirs = pair

    def receive() -> str:
        ours.close()
        _, owned = descriptors.receive(theirs, 1)
        with owned:
            return os.read(owned.take(), 100).decode()

    reader, writer = os.pipe()
    with Child(receive) as child:
        descriptors.send(ours, b"pipe", [reader])
        os.write(writer, b"through a passed pipe")
        assert child.join() == "through a passed pipe"
    os.close(reader)
    os.close(writer)


# ---------------------------------------------------------------- messages on socket pairs


@pytest.fixture
def channels(pair):
    return tuple(PairChannel(side, SUPERVISOR, EPOCH) for side in pair)


def test_message_with_a_descriptor(channels):
    ours, theirs = channels
    fresh = pipes(1)
    assert ours.send(MemoryCreated(4096), reply_to=5, fds=tuple(fresh)) == 1
    os.close(fresh[0])
    envelope, owned = theirs.receive(1)
    with owned:
        assert envelope == Envelope(EPOCH, 1, 5, 0, MemoryCreated(4096))
        assert len(owned) == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"garbage",
        encode(SUPERVISOR, Envelope(EPOCH + 1, 1, 0, 0, Signalled())),
        encode(SUPERVISOR, Envelope(EPOCH, 1, 0, 0, Signalled())) + b"\0",
    ],
)
def test_descriptors_of_a_refused_message_are_closed(channels, frame):
    ours, theirs = channels
    before = open_descriptors()
    send_and_forget(ours.socket, frame, 2)
    envelope, owned = theirs.receive(2)
    assert envelope is None
    assert len(owned) == 0
    assert theirs.counters.refused == 1
    assert open_descriptors() == before


def test_a_channel_that_brings_only_garbage_ends(channels):
    ours, theirs = channels
    for _ in range(MAX_REFUSED - 1):
        send_and_forget(ours.socket, b"garbage", 1)
        assert theirs.receive(1)[0] is None
    send_and_forget(ours.socket, b"garbage", 1)
    with pytest.raises(ChannelError, match="in a row"):
        theirs.receive(1)


def test_an_empty_message_with_descriptors_is_the_end(channels):
    ours, theirs = channels
    fresh = pipes(1)
    ours.socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fresh))])
    os.close(fresh[0])
    with pytest.raises(ChannelError, match="closed"):
        theirs.receive(1)


def test_the_end_of_the_channel(channels):
    ours, theirs = channels
    ours.send(Signalled())
    ours.close()
    assert theirs.receive()[0] is not None
    with pytest.raises(ChannelError, match="closed"):
        theirs.receive()
    with pytest.raises(DescriptorError):
        theirs.send(Signalled())
    theirs.close()
    with pytest.raises(DescriptorError):
        theirs.receive()


def test_unexpected_descriptors_end_the_channel(channels):
    ours, theirs = channels
    fresh = pipes(1)
    ours.send(Signalled(), fds=tuple(fresh))
    os.close(fresh[0])
    with pytest.raises(DescriptorError, match="cut"):
        theirs.receive()


def test_a_limit_on_open_files_is_named(pair):
    """The kernel says of a descriptor that it has no room for what it says of one that nobody expects."""
    ours, theirs = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors.send(theirs, b"frame", (0,))
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(DescriptorError, match=r"No file descriptors available \(os error 24\): raise the limit"):
            descriptors.receive(ours, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_peer_has_said_is_read_though_it_ended_with_something_unread(pair):
    """The kernel reports the reset of the connection ahead of the messages that are still there."""
    ours, theirs = pair
    descriptors.send(theirs, b"the reason")
    descriptors.send(ours, b"never read")
    theirs.close()
    assert descriptors.receive(ours)[0] == b"the reason"
    assert descriptors.receive(ours)[0] == b""


def test_a_message_that_is_longer_than_asked_for_is_refused(pair):
    ours, theirs = pair
    descriptors.send(theirs, b"bound")
    assert descriptors.receive(ours, maximum_size=5)[0] == b"bound"
    descriptors.send(theirs, b"bound!")
    with pytest.raises(DescriptorError, match="cut"):
        descriptors.receive(ours, maximum_size=5)
