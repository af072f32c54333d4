"""Interrupt lines of devices: given out by an allocator, raised by devices, delivered once per batch of exits.

While a batch of exits is executed, a line that is raised is put on a list of due ones; the end of the batch delivers
that list. Edges of one batch become one (a UART whose transmitter is infinitely fast would interrupt for every byte),
and a batch costs what was raised in it, not what exists.
"""

from __future__ import annotations

import os
import select

from base.lean_typing import TYPE_CHECKING, Callable, NamedTuple
from ipc.schema import Flag, RecordOf, Section
from ipc.shared_event import raise_event
from vmm.errors import DeviceError
from vmm.layout import FIRST_DEVICE_GSI, IOAPIC_PIN_COUNT, LAST_DEVICE_GSI

if TYPE_CHECKING:
    from collections.abc import Collection


class InterruptState(NamedTuple):
    """``pending``: an edge that came while the GSI was masked waits for its unmasking."""

    pending: bool


class DueInterrupts:
    """The lines that were raised in a batch. ``held``: one is being executed."""

    __slots__ = ("_lines", "held")

    def __init__(self) -> None:
        self._lines: list[InterruptLine] = []
        self.held = False

    def begin_batch(self) -> None:
        """Keep edges back until :meth:`end_batch`."""
        self.held = True

    def end_batch(self) -> None:
        """Deliver what was kept back, in the order in which it was raised."""
        self.held = False
        if self._lines:
            self.deliver()

    def deliver(self) -> None:
        """Deliver what was kept back so far; the batch goes on."""
        lines, self._lines = self._lines, []
        for line in lines:
            line.deliver()

    def add(self, line: InterruptLine) -> None:
        """Keep an edge of this line back."""
        self._lines.append(line)

    def drop(self, line: InterruptLine) -> None:
        """Forget an edge that was kept back."""
        if line in self._lines:
            self._lines.remove(line)


class InterruptLine:
    """A pin of the IOAPIC, edge-triggered: an eventfd that a worker binds to its GSI (irqfd).

    ``triggers`` counts edges, those included that became one with others.
    """

    SECTION = Section("interrupt", 1, RecordOf(InterruptState, pending=Flag()))

    __slots__ = ("_due", "_due_interrupts", "_receivers", "eventfd", "gsi", "triggers")

    def __init__(
        self, gsi: int, due_interrupts: DueInterrupts | None = None, state: InterruptState | None = None
    ) -> None:
        self.gsi = gsi
        self.eventfd = os.eventfd(1 if state is not None and state.pending else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.triggers = 0
        self._due_interrupts = due_interrupts or DueInterrupts()
        self._due = False
        self._receivers: tuple[Callable[[], None], ...] = ()

    def add_receiver(self, receive: Callable[[], None]) -> None:
        """Hand edges to something else as well: a pin of another interrupt controller that the line is wired to."""
        self._receivers = (*self._receivers, receive)

    def trigger(self) -> None:
        """Raise the interrupt. An event that came while the GSI was masked is delivered when it is unmasked."""
        self.triggers += 1
        if not self._due_interrupts.held:
            self.deliver()
        elif not self._due:
            self._due = True
            self._due_interrupts.add(self)

    def deliver(self) -> None:
        """Pass an edge on, at the end of the batch or at once."""
        self._due = False
        raise_event(self.eventfd)
        for receive in self._receivers:
            receive()

    @property
    def instance(self) -> str:
        """The GSI."""
        return str(self.gsi)

    def save(self) -> InterruptState:
        """Return whether an edge waits; nothing is taken away."""
        poll = select.poll()
        poll.register(self.eventfd, select.POLLIN)
        return InterruptState(self._due or bool(poll.poll(0)))

    def close(self) -> None:
        """Close the eventfd. It must not be raised any more."""
        self._due_interrupts.drop(self)
        os.close(self.eventfd)
        self.eventfd = -1


class InterruptAllocator:
    """Gives out the pins of the IOAPIC. ``wire`` connects a line that is given out with what else it leads to."""

    def __init__(
        self, due_interrupts: DueInterrupts, wire: Callable[[InterruptLine], None] = lambda line: None
    ) -> None:
        self._due_interrupts = due_interrupts
        self._wire = wire
        self._lines: dict[int, InterruptLine] = {}

    @property
    def lines(self) -> tuple[InterruptLine, ...]:
        """Return what was given out, in the order of the GSIs."""
        return tuple([self._lines[gsi] for gsi in sorted(self._lines)])

    @property
    def connected(self) -> Collection[int]:
        """The GSIs that were given out: a view that shows what comes and goes."""
        return self._lines.keys()

    def line(self, gsi: int = -1, state: InterruptState | None = None) -> InterruptLine:
        """Return a line of its own: the lowest pin for devices that is free, or one that a device has by convention.

        Raises DeviceError when there is none.
        """
        if gsi < 0:
            free = (pin for pin in range(FIRST_DEVICE_GSI, LAST_DEVICE_GSI + 1) if pin not in self._lines)
            gsi = next(free, -1)
            if gsi < 0:
                raise DeviceError(f"all interrupt lines up to {LAST_DEVICE_GSI} are in use")
        elif gsi in self._lines or gsi >= IOAPIC_PIN_COUNT:
            raise DeviceError(f"there is no free interrupt line {gsi}")
        line = self._lines[gsi] = InterruptLine(gsi, self._due_interrupts, state)
        self._wire(line)
        return line

    def free(self, line: InterruptLine) -> None:
        """Take a line back and close it; its route must be masked by then. Raises DeviceError if it is not ours."""
        if self._lines.get(line.gsi) is not line:
            raise DeviceError(f"interrupt line {line.gsi} was not given out")
        del self._lines[line.gsi]
        line.close()

    def close(self) -> None:
        """Take all lines back."""
        for line in self.lines:
            self.free(line)
