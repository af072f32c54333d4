"""The ZeroMQ control channel between the controller and one worker, and framing for the socket-pair channels.

One endpoint and one PAIR socket on each side per worker, so that a message's origin is known by construction.
ZeroMQ contexts are made after the fork only. docs/formats/messages.md describes the frames.
"""

from __future__ import annotations

import os
import select
import time

import zmq

from base import faults
from base.lean_std import socket
from base.lean_typing import Any
from ipc import descriptors
from ipc.errors import ChannelError, MessageError
from ipc.launch_plan import ENDPOINT_BOUND
from ipc.schema import MAX_FRAME_SIZE, Envelope, Schema, decode, encode

#: Frames that may wait in one direction; a peer that does not read is failed instead of growing our memory.
HIGH_WATER_MARK = 64
#: A controller that does not answer HELLO in this time is dead or hostile.
WELCOME_TIMEOUT_S = 30
#: A peer that sends this many refused frames in a row is hostile or broken. Not in all: commands that came too late
#: on a busy host must not add up, over weeks, to the end of the channel.
MAX_REFUSED = 64


class Counters:
    """What went over a channel, and what was refused and why."""

    __slots__ = ("expired", "malformed", "received", "sent", "stale")

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.malformed = 0
        self.stale = 0
        self.expired = 0

    @property
    def refused(self) -> int:
        """Frames that were not handed on."""
        return self.malformed + self.stale + self.expired


class Sequencer:
    """Sans-IO core of a channel: numbers what is sent, checks what is received."""

    __slots__ = ("_epoch", "_last_received", "_last_sent", "_refused_in_a_row", "_schema", "counters")

    def __init__(self, schema: Schema, epoch: int) -> None:
        self._schema = schema
        self._epoch = epoch
        self._last_sent = 0
        self._last_received = 0
        self._refused_in_a_row = 0
        self.counters = Counters()

    def frame(self, message: Any, reply_to: int = 0, deadline: int = 0) -> tuple[int, bytes]:
        """Return (sequence number, frame) for a message to send."""
        sequence = self._last_sent + 1
        frame = encode(self._schema, Envelope(self._epoch, sequence, reply_to, deadline, message))
        self._last_sent = sequence
        self.counters.sent += 1
        return sequence, frame

    def accept(self, frame: bytes, now: int = 0) -> Envelope | None:
        """Return the envelope of a received frame, or None if it was refused (and counted).

        Refused: malformed frames, another epoch, sequence numbers that do not rise, and, if ``now`` (CLOCK_MONOTONIC,
        ns) is given, frames whose deadline has passed. Raises ChannelError when too many in a row had to be refused.
        """
        envelope = self._check(frame, now)
        if envelope is not None:
            self._refused_in_a_row = 0
            return envelope
        self._refused_in_a_row += 1
        if self._refused_in_a_row >= MAX_REFUSED:
            raise ChannelError(f"the peer sent {self._refused_in_a_row} frames in a row that had to be refused")
        return None

    def _check(self, frame: bytes, now: int) -> Envelope | None:
        try:
            envelope = decode(self._schema, frame)
        except MessageError:
            self.counters.malformed += 1
            return None
        if envelope.epoch != self._epoch or envelope.sequence <= self._last_received:
            self.counters.stale += 1
            return None
        self._last_received = envelope.sequence
        if now and envelope.deadline and envelope.deadline < now:
            self.counters.expired += 1
            return None
        self.counters.received += 1
        return envelope


class _FaultPoint:
    """What an armed channel fault does to the frames of one direction."""

    __slots__ = ("_held", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._held: bytes | None = None

    def pass_on(self, frame: bytes) -> tuple[bytes, ...]:
        """Return the frames that take the place of ``frame``: none, itself, or several."""
        fault = faults.visit(self._name)
        if fault is None and self._held is None:
            return (frame,)
        frames: tuple[bytes, ...] = (frame,)
        if fault is not None:
            if fault.action == "drop":
                return ()
            if fault.action == "reorder" and self._held is None:
                self._held = frame  # until the next frame has overtaken it
                return ()
            frames = (frame, frame) if fault.action == "duplicate" else (faults.mangle(fault, frame),)
        if self._held is not None:
            frames, self._held = (*frames, self._held), None
        return frames


class Channel:
    """One side of a worker's ZeroMQ channel. Never blocks."""

    def __init__(self, context: zmq.Context[Any], schema: Schema, epoch: int) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_SIZE)
        # A reconnect would call socket(2), which the filter of a cell does not allow.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._sequencer = Sequencer(schema, epoch)
        self._outgoing = _FaultPoint("channel.send")
        self._incoming = _FaultPoint("channel.receive")
        self._received: list[bytes] = []
        self._path = ""

    @property
    def counters(self) -> Counters:
        """Statistics of this side."""
        return self._sequencer.counters

    def bind(self, path: str, peers: tuple[int, ...] = ()) -> None:
        """Listen at ``path`` (the controller's side, before the worker is forked). Raises ChannelError.

        ``peers``: the users that may connect, if the worker is not of ours: then its path is open to everybody who can
        get there, and libzmq asks the kernel who it is (SO_PEERCRED).
        """
        before = os.umask(0) if peers else 0
        try:
            for uid in peers:
                self._socket.setsockopt(zmq.IPC_FILTER_UID, uid)
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise ChannelError(f"cannot bind the control channel {path}: {error.strerror}") from None
        finally:
            if peers:
                os.umask(before)
        self._path = path

    def connect(self, path: str) -> None:
        """Connect to ``path`` (the worker's side). Raises ChannelError."""
        try:
            self._socket.connect(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise ChannelError(f"cannot connect the control channel {path}: {error.strerror}") from None

    def unlink(self) -> None:
        """Remove the endpoint's path after HELLO; the connection stays."""
        if self._path:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
            self._path = ""

    def fileno(self) -> int:
        """Return the descriptor to poll for reading. Edge-triggered: read until None after every send and receive."""
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, message: Any, reply_to: int = 0, deadline: int = 0) -> int:
        """Queue a message; return its sequence number. Raises ChannelError when the peer does not read."""
        sequence, frame = self._sequencer.frame(message, reply_to, deadline)
        for each in self._outgoing.pass_on(frame):
            try:
                self._put(each)
            except zmq.Again:
                raise ChannelError("the peer of the control channel is gone or does not read") from None
            except zmq.ZMQError as error:
                raise ChannelError(f"cannot send on the control channel: {error.strerror}") from None
        return sequence

    def _put(self, frame: bytes) -> None:
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            # Perhaps there is room: libzmq looks for news of the peer's reading once in a millisecond only when it
            # sends, but always when it is asked for its events.
            if not self._socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
                raise
            self._socket.send(frame, zmq.DONTWAIT)

    def receive(self, now: int = 0) -> Envelope | None:
        """Return the next acceptable message, None when there is none. Raises ChannelError on a hostile peer."""
        while True:
            while self._received:
                envelope = self._sequencer.accept(self._received.pop(0), now)
                if envelope is not None:
                    return envelope
            try:
                frame = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return None
            except zmq.ZMQError as error:
                raise ChannelError(f"cannot receive on the control channel: {error.strerror}") from None
            self._received.extend(self._incoming.pass_on(frame))

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket and remove the path if it is still there.

        What was sent and has not left yet is dropped, or sent while the context ends, for at most ``linger_ms``.
        """
        self._socket.close(linger_ms)
        self.unlink()


class PairChannel:
    """Messages with descriptors over an inherited SEQPACKET socket; blocks or not as the socket does."""

    def __init__(self, pair: socket.socket, schema: Schema, epoch: int) -> None:
        self.socket = pair
        self._sequencer = Sequencer(schema, epoch)

    @property
    def counters(self) -> Counters:
        """Statistics of this side."""
        return self._sequencer.counters

    def fileno(self) -> int:
        """Return the descriptor to poll for reading (level-triggered)."""
        return self.socket.fileno()

    def send(self, message: Any, reply_to: int = 0, fds: tuple[int, ...] = ()) -> int:
        """Send a message; return its sequence number. Raises DescriptorError."""
        sequence, frame = self._sequencer.frame(message, reply_to)
        descriptors.send(self.socket, frame, fds)
        return sequence

    def receive(self, maximum: int = 0) -> tuple[Envelope | None, descriptors.OwnedDescriptors]:
        """Receive one message with at most ``maximum`` descriptors; (None, …) for a refused one.

        Raises ChannelError("closed") at the end of the channel and DescriptorError; BlockingIOError passes through.
        """
        frame, owned = descriptors.receive(self.socket, maximum)
        if not frame:
            owned.close()
            raise ChannelError("the peer closed its channel")
        try:
            envelope = self._sequencer.accept(frame)
        except ChannelError:
            owned.close()
            raise
        if envelope is None:
            owned.close()
            return None, descriptors.OwnedDescriptors()
        return envelope, owned

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def await_endpoint(channel: socket.socket) -> None:
    """In a cell: wait on its descriptor channel until the supervisor says that the controller wants it.

    Raises ChannelError, DescriptorError.
    """
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.poll()
    frame, owned = descriptors.receive(channel, maximum_size=len(ENDPOINT_BOUND))
    owned.close()
    if frame != ENDPOINT_BOUND:
        raise ChannelError("nobody wants this worker")


def await_welcome(channel: Channel, welcome: type[Any]) -> None:
    """In a cell: wait for the answer to its HELLO. Raises ChannelError."""
    deadline = time.monotonic() + WELCOME_TIMEOUT_S
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        envelope = channel.receive()
        if envelope is not None:
            if isinstance(envelope.message, welcome):
                return
            raise ChannelError(f"the controller answered HELLO with {type(envelope.message).__name__}")
        left = deadline - time.monotonic()
        if left <= 0:
            raise ChannelError(f"the controller did not answer HELLO within {WELCOME_TIMEOUT_S} s")
        poll.poll(left * 1000)
