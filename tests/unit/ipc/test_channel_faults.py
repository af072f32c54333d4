"""Armed faults on the control channel."""

from __future__ import annotations

import select
import signal
import time
from typing import Any

import pytest

from base import faults
from ipc.channel import Channel
from ipc.errors import ChannelError
from ipc.messages.worker import Ping, Pong
from ipc.schema import Envelope
from tests.harness.channels import HELLO, Place, answer_hello, controller, receive, worker
from tests.harness.processes import Child, wait_for

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
            wait_for(lambda: channel.receive() is None and channel.counters.stale == 1)
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
