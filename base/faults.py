"""Fault points: places where the product can be made to fail on purpose; inert unless armed by the jailer.

A specification is ``POINT=ACTION[,option=value…]``. Actions: ``kill`` (SIGKILL to oneself), ``crash`` (an access
that ends by SIGSEGV), ``exit`` (exit at once with status 1), ``stop`` (SIGSTOP to oneself), ``delay`` (``ms=``), and
for channels ``drop``, ``duplicate``, ``reorder``, ``truncate``, ``corrupt``. Options: ``after=N`` (skip the first N
visits), ``count=N`` (act N times, default 1, 0 = for ever), ``ms=N``, ``seed=N`` (for ``corrupt``).

Only the jailer arms (in the template, before any fork): :func:`arm` works until :func:`freeze`, and cells call
``freeze`` first.
"""

from __future__ import annotations

import os
import time

from base import timeline
from base.errors import FaultSpecError
from base.lean_std import signal
from base.lean_typing import Callable

#: Every fault point of the product and what is about to happen when it is visited.
FAULT_POINTS: dict[str, str] = {
    "supervisor.start": "the supervisor has entered its loop",
    "supervisor.spawn.requested": "a spawn request was accepted",
    "supervisor.spawn.prepared": "the cell's socket pairs exist",
    "supervisor.spawn.forked": "the cell was forked",
    "supervisor.spawn.seal": "the cell reported its first filter; its walls are not verified yet",
    "supervisor.spawn.verified": "the cell's walls were verified; it was not told yet",
    "supervisor.spawn.answered": "the controller was told of the new cell",
    "supervisor.memory": "guest memory was made, not handed over yet",
    "cell.forked": "first statement of a cell",
    "cell.confined": "the cell has dropped its privileges",
    "cell.filtered": "the cell has installed its first filter",
    "cell.verified": "the cell was told that its walls are right, and is not dumpable any more",
    "cell.sealed": "the cell was told that its tighter walls are right",
    "vmm.start": "the controller is about to serve",
    "vmm.instance_start": "InstanceStart is about to build the microVM",
    "vmm.kernel_loaded": "the kernel is in guest memory",
    "vmm.configured": "the workers are configured",
    "vcpu.hello": "the worker is about to say HELLO",
    "vcpu.configure": "the worker received Configure",
    "vcpu.configured": "the worker's VM is made",
    "vcpu.resume": "the worker received Resume",
    "vcpu.pause": "the worker received Pause",
    "vcpu.hand_over": "the worker is to hand over to another one",
    "vcpu.save": "the worker received SaveState",
    "vcpu.resumes_other": "the worker was configured to go on for another one",
    "vcpu.load": "the worker received LoadState",
    "vcpu.take_over": "the worker received TakeOver",
    "vcpu.finish": "the worker received Finish",
    "device.hello": "the device cell is about to say HELLO",
    "device.attach": "the device cell received Attach",
    "device.activate": "the device cell received Activate",
    "device.kick": "the driver has notified a device, which has not looked at its queue yet",
    "device.used": "chains were given back to the driver, which was not interrupted yet",
    "device.stop": "the device cell received Stop",
    "device.finish": "the device cell received Finish",
    "channel.send": "a frame is about to be sent on the ZeroMQ channel of a worker or device cell",
    "channel.receive": "a frame was received on the ZeroMQ channel of a worker or device cell",
}
PROCESS_ACTIONS = frozenset(("kill", "exit", "crash", "stop", "delay"))
CHANNEL_ACTIONS = frozenset(("drop", "duplicate", "reorder", "truncate", "corrupt"))
_OPTIONS = ("after", "count", "ms", "seed")


class Fault:
    """One armed fault."""

    __slots__ = ("action", "after", "count", "ms", "point", "seed", "visits")

    def __init__(self, point: str, action: str) -> None:
        self.point = point
        self.action = action
        self.after = 0
        self.count = 1
        self.ms = 100
        self.seed = 0
        self.visits = 0

    def due(self) -> bool:
        """Count a visit; True if the fault acts now."""
        self.visits += 1
        return self.visits > self.after and (self.count == 0 or self.visits <= self.after + self.count)


def _signal_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


_armed: dict[str, list[Fault]] = {}
_frozen = False
_send_signal: Callable[[int], None] = _signal_oneself


def parse(specification: str) -> Fault:
    """Parse one specification. Raises FaultSpecError that names the mistake."""
    head, *options = specification.split(",")
    point, separator, action = head.partition("=")
    if not separator or point not in FAULT_POINTS:
        raise FaultSpecError(f"{specification!r}: unknown fault point {point!r}; known: {', '.join(FAULT_POINTS)}")
    allowed = PROCESS_ACTIONS | CHANNEL_ACTIONS if point.startswith("channel.") else PROCESS_ACTIONS
    if action not in allowed:
        raise FaultSpecError(f"{specification!r}: action is one of {', '.join(sorted(allowed))}")
    fault = Fault(point, action)
    for option in options:
        name, separator, value = option.partition("=")
        if name not in _OPTIONS or not value.isdecimal() or len(value) > 9:
            raise FaultSpecError(f"{specification!r}: options are {', '.join(f'{name}=N' for name in _OPTIONS)}")
        setattr(fault, name, int(value))
    return fault


def arm(specifications: tuple[str, ...]) -> None:
    """Arm faults, all or none; only before :func:`freeze`. Raises FaultSpecError."""
    if _frozen:
        raise FaultSpecError("faults are armed by the jailer only, before the first cell is forked")
    for fault in [parse(specification) for specification in specifications]:
        _armed.setdefault(fault.point, []).append(fault)


def freeze() -> None:
    """Make any further arming impossible in this process and its children."""
    global _frozen
    _frozen = True


def signal_by(sender: Callable[[int], None]) -> None:
    """Have the signals of ``kill`` and ``stop`` sent by somebody else: process 1 of a pid namespace cannot itself."""
    global _send_signal
    _send_signal = sender


def visit(point: str) -> Fault | None:
    """Pass a fault point. Process actions happen here; a channel action is returned for the channel to carry out."""
    assert point in FAULT_POINTS, point
    timeline.mark(point)
    if not _armed:
        return None
    chosen: Fault | None = None
    for fault in _armed.get(point, ()):
        if not fault.due():  # every fault of the point counts this visit, whichever acts
            continue
        if fault.action not in CHANNEL_ACTIONS:
            _act(fault)
        elif chosen is None:
            chosen = fault
    return chosen


def is_armed(point: str) -> bool:
    """Tell whether a point has a fault: where it would be passed for every request it is passed only then."""
    assert point in FAULT_POINTS, point
    return point in _armed


def count(point: str) -> None:
    """Count a visit that a child process makes: its copy of the counters ends with it."""
    for fault in _armed.get(point, ()):
        fault.visits += 1


def _act(fault: Fault) -> None:
    if fault.action == "kill":
        _send_signal(signal.SIGKILL)
    elif fault.action == "crash":
        import ctypes

        ctypes.string_at(0)  # a signal to itself would not end process 1 of a pid namespace
    elif fault.action == "stop":
        _send_signal(signal.SIGSTOP)
    elif fault.action == "exit":
        os._exit(1)
    elif fault.action == "delay":
        time.sleep(fault.ms / 1000)


def mangle(fault: Fault, frame: bytes) -> bytes:
    """Return the frame as ``truncate`` or ``corrupt`` leave it."""
    if fault.action == "truncate":
        return frame[: len(frame) // 2]
    if fault.action == "corrupt" and frame:
        position = (fault.seed * 2654435761 + fault.visits) % len(frame)
        return frame[:position] + bytes([frame[position] ^ 0xFF]) + frame[position + 1 :]
    return frame
