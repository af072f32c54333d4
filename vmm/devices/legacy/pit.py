"""The 8254 interval timer and port 0x61 of a PC. Source: Intel 82C54 data sheet (231244-006).

A counter is not counted: what it shows follows from the time since it was loaded. Only the edges of counter 0, which
interrupt, need a timer of the host, and only while one could reach the guest. Edges that came while an earlier one was
not acknowledged yet are handed on afterwards, one at a time and at most MAX_BACKLOG, so that a guest that counts ticks
loses none; of those that came while the interrupt was masked one is left, as on the chip. A new count is loaded at
once, also in the modes 2 and 3, where the chip would end the cycle first.
"""

from __future__ import annotations

import time

from base.deferral import Deferral
from base.lean_typing import Callable, NamedTuple
from ipc.schema import U8, U16, U64, Flag, Int, ListOf, RecordOf, Section
from vmm.devices.bus import Device

#: Offset of port 0x61 in the device.
SPEAKER = 4

FREQUENCY_HZ = 1_193_182
SECOND_NS = 1_000_000_000
#: Interrupts come at most this often, whatever the guest asks for.
MIN_INTERVAL_NS = 200_000
#: So many edges of a periodic counter are made up for.
MAX_BACKLOG = 20

# Whether an edge of counter 0 would reach the guest: masked everywhere; one waits already; yes.
MASKED, WAITING, LISTENING = 0, 1, 2

CONTROL = 3
CONTROL_READ_BACK = 3
READ_BACK_NO_COUNT = 0x20
READ_BACK_NO_STATUS = 0x10
ACCESS_LATCH, ACCESS_LOW, ACCESS_HIGH, ACCESS_BOTH = 0, 1, 2, 3
STATUS_OUT = 0x80
STATUS_NULL_COUNT = 0x40

SPEAKER_GATE = 0x01
SPEAKER_DATA = 0x02
SPEAKER_REFRESH_SHIFT = 4
SPEAKER_OUT_SHIFT = 5
#: The refresh bit changes every 2^14 ns, about 16 µs; on a PC every 15.
_REFRESH_NS_SHIFT = 14

_TRIGGERED = (1, 5)
_PERIODIC = (2, 3)


COUNTER_COUNT = 3
#: Longer times are not saved: 146 years.
_MAX_NS = 1 << 62


class PitCounterState(NamedTuple):
    """One counter. ``cycle`` is in ticks; ``passed_ns`` since it was loaded or triggered; ``held`` the ns that it had
    counted when its gate stopped it."""

    mode: int
    access: int
    bcd: bool
    gate: bool
    cycle: int
    loaded: bool
    held: int
    latch: int
    latched: bool
    status: int
    status_latched: bool
    reads_high: bool
    write_low: int
    writes_high: bool
    passed_ns: int


class PitState(NamedTuple):
    """The 8254 and port 0x61. ``delivered``: edges of counter 0 that were handed on since it was loaded."""

    counters: tuple[PitCounterState, ...]
    speaker: bool
    delivered: int


_COUNTER = RecordOf(
    PitCounterState,
    mode=Int(5),
    access=Int(ACCESS_BOTH, ACCESS_LOW),
    bcd=Flag(),
    gate=Flag(),
    cycle=Int(1 << 16, 1),
    loaded=Flag(),
    held=Int(_MAX_NS),
    latch=Int(U16),
    latched=Flag(),
    status=Int(U8),
    status_latched=Flag(),
    reads_high=Flag(),
    write_low=Int(U8),
    writes_high=Flag(),
    passed_ns=Int(_MAX_NS),
)


def _ticks(nanoseconds: int) -> int:
    return nanoseconds * FREQUENCY_HZ // SECOND_NS


def _nanoseconds(ticks: int) -> int:
    """Return the time after which so many ticks have passed."""
    return -(-ticks * SECOND_NS // FREQUENCY_HZ)


class PitCounter:
    """One counter. Times are ``now`` in ns of any steady clock; ``since`` is when it was loaded or triggered."""

    __slots__ = (
        "access",
        "bcd",
        "cycle",
        "gate",
        "held",
        "latch",
        "latched",
        "loaded",
        "mode",
        "reads_high",
        "since",
        "status",
        "status_latched",
        "write_low",
        "writes_high",
    )

    def __init__(self, *, gate: bool) -> None:
        self.mode = 0
        self.access = ACCESS_BOTH
        self.bcd = False
        self.gate = gate
        #: Ticks per cycle, 1 to 65536.
        self.cycle = 65536
        #: A count was written, and, in the modes 1 and 5, triggered; else the counter stands still.
        self.loaded = False
        self.since = 0
        #: Time that had been counted when the gate stopped it (modes 0 and 4).
        self.held = 0
        self.latch = 0
        self.latched = False
        self.status = 0
        self.status_latched = False
        self.reads_high = False
        self.write_low = 0
        self.writes_high = False

    # ------------------------------------------------------------ what it shows

    def elapsed(self, now: int) -> int:
        """Return how many ticks it has counted since it was loaded; 0 while it is not."""
        if not self.loaded:
            return 0
        if not self.gate and self.mode not in _TRIGGERED:
            return _ticks(self.held)
        return _ticks(max(0, now - self.since))

    def value(self, now: int) -> int:
        """Return the counter, as a number of ticks."""
        passed, count = self.elapsed(now), self.cycle
        if self.mode == 2:
            return count - passed % count
        if self.mode == 3:
            high = count + 1 >> 1
            phase = passed % count
            return (count & ~1) - 2 * (phase if phase < high else phase - high)
        return (count - passed) % (10_000 if self.bcd else 65_536)

    def out(self, now: int) -> bool:
        """Return the output."""
        passed, count, mode = self.elapsed(now), self.cycle, self.mode
        if mode == 0:
            return self.loaded and passed >= count
        if not self.loaded or (mode in _PERIODIC and not self.gate):
            return True
        if mode == 1:
            return passed >= count
        if mode == 2:
            return passed % count != count - 1
        if mode == 3:
            return passed % count < count + 1 >> 1
        return passed != count

    # ------------------------------------------------------------ edges

    def edges(self, now: int) -> int:
        """Return how often the output has risen since the counter was loaded."""
        passed = self.elapsed(now)
        if self.mode in _PERIODIC:
            return passed // self.cycle if self.gate else 0
        return int(self.loaded and passed >= self._terminal())

    def _terminal(self) -> int:
        return self.cycle + (1 if self.mode in (4, 5) else 0)

    def edge_time(self, number: int) -> int | None:
        """Return when the output rises for the ``number``-th time (from 1); None if that will not come by itself."""
        if not self.loaded or (not self.gate and self.mode not in _TRIGGERED):
            return None
        if self.mode in _PERIODIC:
            return self.since + _nanoseconds(number * self.cycle)
        return self.since + _nanoseconds(self._terminal()) if number == 1 else None

    # ------------------------------------------------------------ what the guest does

    def control(self, access: int, mode: int, bcd: bool) -> None:
        """A control word: the counter stands still until it is given a count."""
        self.access, self.mode, self.bcd = access, mode, bcd
        self.loaded = self.reads_high = self.writes_high = False
        self.latched = self.status_latched = False
        self.held = self.since = 0

    def latch_count(self, now: int) -> None:
        """Keep the count until it is read; a second latch before that does nothing."""
        if not self.latched:
            self.latch = self._digits(self.value(now))
            self.latched = True

    def latch_status(self, now: int) -> None:
        """Keep the status until it is read."""
        if not self.status_latched:
            null_count = 0 if self.loaded else STATUS_NULL_COUNT
            out = STATUS_OUT if self.out(now) else 0
            self.status = out | null_count | self.access << 4 | self.mode << 1 | self.bcd
            self.status_latched = True

    def _digits(self, ticks: int) -> int:
        """Return what 16 bits show: binary, or four decimal digits."""
        if not self.bcd:
            return ticks & 0xFFFF
        return int(str(ticks % 10_000), 16)

    def read(self, now: int) -> int:
        """Read the counter's port: status, then count, then the running counter."""
        if self.status_latched:
            self.status_latched = False
            return self.status
        shown = self.latch if self.latched else self._digits(self.value(now))
        high = self.access == ACCESS_HIGH or (self.access == ACCESS_BOTH and self.reads_high)
        if self.access == ACCESS_BOTH:
            self.reads_high = not self.reads_high
        if not self.reads_high:
            self.latched = False
        return shown >> 8 if high else shown & 0xFF

    def write(self, value: int, now: int) -> bool:
        """Write a byte of the count; True if the counter was loaded by that."""
        if self.access == ACCESS_BOTH and not self.writes_high:
            self.write_low = value
            self.writes_high = True
            if self.mode == 0:
                self.loaded = False  # the first byte stops it
                self.since = 0
            return False
        if self.access == ACCESS_BOTH:
            self._load(value << 8 | self.write_low, now)
        else:
            self._load(value << 8 if self.access == ACCESS_HIGH else value, now)
        self.writes_high = False
        return True

    def _load(self, digits: int, now: int) -> None:
        if self.bcd:
            # A nibble above 9 is no digit; it counts as its value.
            count = sum((digits >> 4 * place & 0xF) * 10**place for place in range(4))
            self.cycle = count % 10_000 or 10_000
        else:
            self.cycle = digits or 65_536
        if self.mode in _TRIGGERED:
            return
        self.loaded = True
        self.since = now
        self.held = 0

    def set_gate(self, gate: bool, now: int) -> None:
        """Set the gate. Its rise triggers or reloads; low, it stops the counter, but for a triggered one."""
        if gate == self.gate:
            return
        if self.mode in _TRIGGERED:
            if gate:
                self.loaded = True
                self.since = now
        elif self.loaded and self.mode in _PERIODIC:
            self.held = 0
            self.since = now
        elif self.loaded and gate:
            self.since = now - self.held
        elif self.loaded:
            self.held = min(max(0, now - self.since), _MAX_NS)
        self.gate = gate

    def save(self, now: int) -> PitCounterState:
        """Return the registers; the time as what has passed."""
        passed_ns = min(max(0, now - self.since), _MAX_NS) if self.loaded else self.since
        return PitCounterState(*[*[getattr(self, name) for name in PitCounterState._fields[:-1]], passed_ns])

    def restore(self, state: PitCounterState, now: int) -> None:
        """Become what was saved, as if no time had passed since."""
        for name, value in zip(PitCounterState._fields[:-1], state, strict=False):
            setattr(self, name, value)
        self.since = now - state.passed_ns if state.loaded else state.passed_ns


class Pit(Device):
    """Counters at the offsets 0 to 2, the control register at 3, port 0x61 at 4.

    ``interrupt`` raises the interrupt of counter 0; ``reach`` tells whether an edge of it would reach the guest now;
    ``schedule`` sets the only timer (ns of ``clock``; None: no timer), after which :meth:`fire` is to be called. One
    that is made from a ``state`` goes on as if no time had passed, after :meth:`update`.
    """

    SECTION = Section(
        "pit",
        1,
        RecordOf(
            PitState,
            counters=ListOf(_COUNTER, COUNTER_COUNT, COUNTER_COUNT),
            speaker=Flag(),
            delivered=Int(U64),
        ),
    )
    instance = ""

    def __init__(
        self,
        interrupt: Callable[[], None],
        reach: Callable[[], int],
        schedule: Callable[[int | None], None],
        clock: Callable[[], int] = time.monotonic_ns,
        *,
        state: PitState | None = None,
    ) -> None:
        self._interrupt = interrupt
        self._reach = reach
        self._schedule = schedule
        self._clock = clock
        self.counters = (PitCounter(gate=True), PitCounter(gate=True), PitCounter(gate=False))
        self._speaker = False
        #: Edges of counter 0 that were handed on since it was loaded.
        self._delivered = 0
        self._last_ns = -MIN_INTERVAL_NS
        self._timer_ns: int | None = None
        self._was_masked = state is None
        if state is not None:
            now = clock()
            for counter, saved in zip(self.counters, state.counters, strict=True):
                counter.restore(saved, now)
            self._speaker = state.speaker
            self._delivered = state.delivered

    # ------------------------------------------------------------ interrupts

    def update(self) -> None:
        """Set the timer for the next edge of counter 0, or none: call it when ``reach`` may have changed."""
        due = self._due()
        if due != self._timer_ns:
            self._timer_ns = due
            self._schedule(due)

    def _due(self) -> int | None:
        counter = self.counters[0]
        if not counter.loaded:
            return None
        reach = self._reach()
        if reach == MASKED:
            self._was_masked = True
        elif self._was_masked:
            self._was_masked = False
            self._delivered = max(self._delivered, counter.edges(self._clock()) - 1)
        if reach != LISTENING:
            return None
        edge = counter.edge_time(self._delivered + 1)
        return None if edge is None else max(edge, self._last_ns + MIN_INTERVAL_NS)

    def fire(self) -> None:
        """The timer has fired."""
        self._timer_ns = None
        now = self._clock()
        edges = self.counters[0].edges(now)
        if edges > self._delivered and self._reach() == LISTENING:
            self._delivered = max(self._delivered + 1, edges - MAX_BACKLOG)
            self._last_ns = now
            self._interrupt()
        self.update()

    # ------------------------------------------------------------ registers

    def read(self, offset: int, size: int) -> int:
        """Read a counter or port 0x61; the control register reads as zero."""
        now = self._clock()
        if offset == SPEAKER:
            counter = self.counters[2]
            return (
                counter.gate * SPEAKER_GATE
                | self._speaker * SPEAKER_DATA
                | (now >> _REFRESH_NS_SHIFT & 1) << SPEAKER_REFRESH_SHIFT
                | counter.out(now) << SPEAKER_OUT_SHIFT
            )
        return 0 if offset == CONTROL else self.counters[offset].read(now)

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write a register; of a wider access the low byte counts."""
        value &= 0xFF
        now = self._clock()
        if offset == SPEAKER:
            self._speaker = bool(value & SPEAKER_DATA)
            self.counters[2].set_gate(bool(value & SPEAKER_GATE), now)
        elif offset == CONTROL:
            self._control(value, now)
        elif self.counters[offset].write(value, now) and offset == 0:
            self._delivered = 0
            self.update()
        elif offset == 0:
            self.update()
        return None

    def _control(self, value: int, now: int) -> None:
        number, access = value >> 6, value >> 4 & 3
        if number == CONTROL_READ_BACK:
            for index, counter in enumerate(self.counters):
                if value >> index + 1 & 1:
                    if not value & READ_BACK_NO_COUNT:
                        counter.latch_count(now)
                    if not value & READ_BACK_NO_STATUS:
                        counter.latch_status(now)
            return
        counter = self.counters[number]
        if access == ACCESS_LATCH:
            counter.latch_count(now)
            return
        mode = value >> 1 & 7
        counter.control(access, mode - 4 if mode > 5 else mode, bool(value & 1))
        if number == 0:
            self._delivered = 0
            self.update()

    def save(self) -> PitState:
        """Return the registers. An edge that was not handed on yet is handed on by whoever is made from them."""
        now = self._clock()
        return PitState(tuple([counter.save(now) for counter in self.counters]), self._speaker, self._delivered)
