"""The sans-IO core of a channel: what is refused, and that it is counted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.channel import MAX_REFUSED, Sequencer
from ipc.errors import ChannelError, MessageError
from ipc.messages.records import WORKER
from ipc.messages.worker import Paused, Ping, Pong
from ipc.schema import Envelope, encode

EPOCH = 7


def frame(sequence: int, epoch: int = EPOCH, deadline: int = 0) -> bytes:
    return encode(WORKER, Envelope(epoch, sequence, 0, deadline, Ping()))


def counts(sequencer: Sequencer) -> tuple[int, int, int, int]:
    counters = sequencer.counters
    return counters.received, counters.malformed, counters.stale, counters.expired


@pytest.fixture
def receiver():
    return Sequencer(WORKER, EPOCH)


def test_frames_are_numbered_from_one(receiver):
    sender = Sequencer(WORKER, EPOCH)
    for expected in (1, 2, 3):
        number, sent = sender.frame(Pong("running"), reply_to=40 + expected, deadline=99)
        assert number == expected
        assert receiver.accept(sent) == Envelope(EPOCH, expected, 40 + expected, 99, Pong("running"))
    assert sender.counters.sent == 3
    assert counts(receiver) == (3, 0, 0, 0)


def test_a_message_that_cannot_be_sent_takes_no_number():
    sender = Sequencer(WORKER, EPOCH)
    with pytest.raises(MessageError):
        sender.frame(Paused(-1))
    assert sender.frame(Ping())[0] == 1
    assert sender.counters.sent == 1


@pytest.mark.parametrize("epoch", [0, EPOCH - 1, EPOCH + 1, (1 << 64) - 1])
def test_another_epoch_is_stale(receiver, epoch):
    assert receiver.accept(frame(1, epoch)) is None
    assert counts(receiver) == (0, 0, 1, 0)
    assert receiver.accept(frame(1)) is not None  # its number was not used up


def test_duplicates_and_reordered_frames_are_stale(receiver):
    assert receiver.accept(frame(5)) is not None
    for sequence in (5, 4, 1):
        assert receiver.accept(frame(sequence)) is None
    assert counts(receiver) == (1, 0, 3, 0)
    assert receiver.accept(frame(9)) is not None  # a gap is no error: a frame may be lost to a fault
    assert receiver.accept(frame(8)) is None
    assert counts(receiver) == (2, 0, 4, 0)


def test_a_frame_of_the_past_is_expired(receiver):
    assert receiver.accept(frame(1, deadline=1000), now=1001) is None
    assert receiver.accept(frame(2, deadline=1000), now=1000) is not None
    assert receiver.accept(frame(3, deadline=0), now=1 << 63) is not None
    assert receiver.accept(frame(4, deadline=1)) is not None  # no clock, no deadline
    assert counts(receiver) == (3, 0, 0, 1)
    assert receiver.accept(frame(1, deadline=2000), now=1001) is None  # an expired number is used up
    assert counts(receiver) == (3, 0, 1, 1)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x90", frame(1)[:-1], frame(1) + b"\x00", b"\x00" * (1 << 19)])
def test_garbage_is_malformed(receiver, garbage):
    assert receiver.accept(garbage) is None
    assert counts(receiver) == (0, 1, 0, 0)


def test_too_many_refused_frames_in_a_row_end_the_channel(receiver):
    for _ in range(MAX_REFUSED - 1):
        assert receiver.accept(b"") is None
    with pytest.raises(ChannelError, match="in a row"):
        receiver.accept(b"")
    assert receiver.counters.malformed == receiver.counters.refused == MAX_REFUSED


def test_refused_frames_do_not_add_up_for_ever(receiver):
    """A command that comes too late now and then is not an attack."""
    for sequence in range(1, 3 * MAX_REFUSED, 2):
        assert receiver.accept(frame(sequence, deadline=1), now=2) is None
        assert receiver.accept(frame(sequence + 1)) is not None
    assert receiver.counters.expired > MAX_REFUSED


@pytest.mark.soak("ipc")
def test_model(scale):
    """Whatever arrives in whatever order: each frame is handed on or counted under exactly one heading."""
    events = st.tuples(
        st.integers(1, 30), st.sampled_from([EPOCH, EPOCH, EPOCH, 8]), st.integers(0, 20), st.integers(0, 20)
    )

    @settings(max_examples=scale(200, 20_000))
    @given(st.lists(st.one_of(events, st.binary(max_size=20)), max_size=MAX_REFUSED - 1))
    def run(script) -> None:
        receiver = Sequencer(WORKER, EPOCH)
        last = 0
        expected = [0, 0, 0, 0]
        for event in script:
            if isinstance(event, bytes):
                accepted, heading, got = False, 1, receiver.accept(event)
            else:
                sequence, epoch, deadline, now = event
                got = receiver.accept(frame(sequence, epoch, deadline), now)
                heading = 2 if epoch != EPOCH or sequence <= last else 3 if now and deadline and deadline < now else 0
                accepted = heading == 0
                last = last if heading == 2 else sequence
            assert (got is not None) == accepted
            expected[heading] += 1
            assert list(counts(receiver)) == expected

    run()
