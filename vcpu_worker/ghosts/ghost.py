"""One ghost: it waits for INIT and SIPI as a processor that is off does, then runs the stub.

Everything here but ``ask_to_stop``, ``allow_to_run`` and the counters is for the ghost's own thread. A kick that does
not ask it to stop (vcpu_worker.ghosts.watch) makes it look whether it still runs the stub.
"""

from __future__ import annotations

import fcntl
import time

from base.lean_typing import Callable
from ipc.exit_ring import GHOST_EXITS, GHOST_NMIS, GHOST_RECOVERIES, GHOST_STARTUPS, GHOST_STUB, GHOST_WORDS
from ipc.messages.ghosts import GHOST_INIT, GHOST_INTERRUPT, GHOST_NMI, GHOST_STARTUP, QuiescentGhost
from ipc.messages.records import MsrValue
from ipc.messages.replacement import GhostState
from vcpu_worker.errors import KvmError, MsrError, WorkerError
from vcpu_worker.ghosts import stub
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vcpu import KvmVcpu

EINTR = 4
EAGAIN = 11

#: What :meth:`Ghost.run` returns when it was asked to stop: nothing is on its way through the ghost, or something is.
IDLE = "idle"
BUSY = "busy"

#: So many recoveries in this time are the guest's fault: it writes over stacks, or sends what nobody sends.
MAX_RECOVERIES = 3
RECOVERY_WINDOW_NS = 1_000_000_000
#: How often the state of a ghost between INIT and SIPI is looked at: nothing tells when the SIPI comes.
_SIPI_POLL_S = 50e-6
_REAL_MODE_SHIFT = 8  # a SIPI with vector v sets CS to v << 8
_PAGE_SHIFT = 12
# struct kvm_vcpu_events
_EVENTS_NMI_INJECTED = 12
_EVENTS_NMI_PENDING = 13
_EVENTS_NMI_MASKED = 14
_EVENTS_FLAGS = 20
_EVENT_VALID_SMM = 8

#: Nothing injected, nothing blocked, not in system management mode; a pending NMI stays.
_NO_EVENTS = bytes(_EVENTS_FLAGS) + _EVENT_VALID_SMM.to_bytes(4, "little") + bytes(abi.VCPU_EVENTS_SIZE - 24)

#: What a guest could turn against a ghost whose LAPIC it got hold of: priority, timer, local interrupts.
_LAPIC_SETTINGS = (
    abi.APIC_TPR,
    abi.APIC_LVTT,
    abi.APIC_TMICT,
    abi.APIC_TDCR,
    abi.APIC_LVT_THERMAL,
    abi.APIC_LVT_PERFORMANCE,
    abi.APIC_LVT_LINT0,
    abi.APIC_LVT_LINT1,
    abi.APIC_LVT_ERROR,
)
_END_OF_INTERRUPT = MsrValue(abi.x2apic_msr(abi.APIC_EOI), 0)

#: Called in the ghost's thread: (what, vCPU, vector), see ipc.messages.ghosts.GhostEvent.
Report = Callable[[int, int, int], None]
#: Called in the ghost's thread: (vCPU, text).
ReportRecovery = Callable[[int, str], None]


class GhostError(WorkerError):
    """A ghost cannot go on: the guest led it astray too often, or KVM refused to run it."""

    code = "worker.ghost"


class Ghost:
    """``single_step`` also traps a renewed INIT where the host's KVM has no hardware breakpoints for its guests."""

    def __init__(self, kvm: KvmVcpu, report: Report, recovered: ReportRecovery, *, single_step: bool) -> None:
        self.kvm = kvm
        self.is_stub = False
        #: Words GHOST_* of ipc.exit_ring: our own until :meth:`count_in`.
        self.counters = memoryview(bytearray(8 * GHOST_WORDS)).cast("Q")
        self._report = report
        self._recovered = recovered
        self._single_step = single_step
        self._startup_vector: int | None = None
        self._recovery_times: list[int] = []
        self._stop = False
        #: The INIT that it holds was told of already.
        self._init_told = False
        #: Its LAPIC's settings when it was first made the stub.
        self._lapic_settings: tuple[MsrValue, ...] = ()

    @property
    def index(self) -> int:
        """The guest's number of the vCPU that this is the ghost of."""
        return self.kvm.index

    # ------------------------------------------------------------ from any thread

    def ask_to_stop(self) -> None:
        """Make ``run`` return; KVM_RUN must be kicked beside."""
        self._stop = True
        self.kvm.run8[abi.RUN_IMMEDIATE_EXIT] = 1

    def allow_to_run(self) -> None:
        """Take ``ask_to_stop`` back; only while ``run`` is not executing."""
        self.kvm.run8[abi.RUN_IMMEDIATE_EXIT] = 0
        self._stop = False

    # ------------------------------------------------------------ the ghost's thread

    def configure(self, configure: Callable[[KvmVcpu], None]) -> None:
        """Give it what a vCPU gets before its first instruction (CPUID, LAPIC)."""
        configure(self.kvm)

    def place_stub(self) -> None:
        """Turn it into the stub, if it does not run it already.

        One that has got an INIT waits for its SIPI and becomes the stub then: there is nothing that it could lose
        meanwhile, and the SIPI would be lost on the stub.
        """
        if not self.is_stub and self.kvm.get_mp_state() != abi.MP_STATE_INIT_RECEIVED:
            self._place()

    def count_in(self, words: memoryview) -> None:
        """Count in shared memory from now on; only while ``run`` is not executing."""
        words[:] = self.counters
        self.counters = words

    def state(self) -> GhostState:
        """Tell another worker's ghost of the same vCPU how to go on; only while nothing is on its way through it."""
        waiting = self.kvm.get_mp_state() == abi.MP_STATE_INIT_RECEIVED
        vector = self._startup_vector
        return GhostState(self.index, self.is_stub, vector is not None, vector or 0, waiting)

    def go_on(self, state: GhostState) -> None:
        """Go on for the ghost of another worker, before the first ``run``. An INIT is for the caller to send."""
        if state.started:
            self._startup_vector = state.vector
        if state.stub:
            self._place()

    def _place(self) -> None:
        """Load the stub's registers. What it was doing is given up."""
        kvm = self.kvm
        kvm.set_sregs(stub.sregs(kvm.get_sregs(), self.index))
        kvm.set_msrs((MsrValue(stub.X2APIC_SPURIOUS, stub.SPURIOUS_ENABLED),))
        try:
            kvm.set_msrs((MsrValue(stub.PV_EOI_MSR, stub.pv_eoi(self.index)),))
        except MsrError:
            pass  # each interrupt costs an exit more
        if not self._lapic_settings:
            self._lapic_settings = _lapic_settings(kvm.get_lapic())
        kvm.set_events(_NO_EVENTS)
        self._arm()
        kvm.set_regs(stub.regs(self.index))
        kvm.set_mp_state(abi.MP_STATE_RUNNABLE)
        self.is_stub = True
        self.counters[GHOST_STUB] = 1

    def _arm(self) -> None:
        """Trap a renewed INIT and SIPI, which would make the ghost run the guest's own start-up code here.

        A hardware breakpoint where the last SIPI led to stops before the first instruction, if it leads there again.
        Single-step stops after it: KVM remembers where single-stepping began, and sets TF whenever the flags are
        written while the vCPU is there. At INIT it writes them while RIP is 0 and CS is based at 0xffff0000: so
        single-stepping has to begin there.
        """
        address = None if self._startup_vector is None else self._startup_vector << _PAGE_SHIFT
        if not self._single_step:
            self.kvm.set_guest_debug(abi.GUESTDBG_ENABLE if address is not None else 0, address)
            return
        registers = [0] * len(abi.REGS_NAMES)
        registers[abi.REGS_NAMES.index("rip")] = 0xFFFF_0000
        registers[abi.REGS_NAMES.index("rflags")] = 2
        self.kvm.set_regs(abi.REGS.pack(*registers))
        self.kvm.set_guest_debug(abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP, address)

    def run(self) -> str:
        """Run until asked to stop; returns IDLE or BUSY. Raises GhostError."""
        if not self.is_stub and self.kvm.get_mp_state() != abi.MP_STATE_UNINITIALIZED and not self._await_startup():
            return IDLE
        ioctl = fcntl.ioctl
        descriptor = self.kvm.descriptor
        run32 = self.kvm.run32
        while True:
            try:
                ioctl(descriptor, abi.KVM_RUN)
            except OSError as error:
                if self._stop:
                    return self._stopped()
                if error.errno == EINTR:
                    self._look()
                elif error.errno != EAGAIN or self.is_stub:
                    raise GhostError(f"the ghost of vCPU {self.index}: KVM_RUN: errno {error.errno}") from None
                elif not self._await_startup():
                    return IDLE
                continue
            self.counters[GHOST_EXITS] += 1
            reason = run32[abi.RUN_EXIT_REASON // 4]
            if reason == abi.EXIT_IO:
                self._output()
            elif reason == abi.EXIT_DEBUG:
                self._trapped()
            elif reason != abi.EXIT_INTR:
                self._recover(f"exit reason {reason}")

    def _await_startup(self) -> bool:
        """INIT has come: wait for the SIPI, never by KVM_RUN: that would run the guest's code. False: asked to stop."""
        while self.kvm.get_mp_state() != abi.MP_STATE_RUNNABLE:
            if self._stop:
                self._tell_init()
                return False
            time.sleep(_SIPI_POLL_S)
        self._started(self.kvm.get_sregs())
        return True

    def _started(self, sregs: bytes) -> None:
        vector = int.from_bytes(sregs[abi.SREGS_CS + 12 : abi.SREGS_CS + 14], "little") >> _REAL_MODE_SHIFT
        self._startup_vector = vector
        self._place()
        self.counters[GHOST_STARTUPS] += 1
        self._init_told = False
        self._report(GHOST_STARTUP, self.index, vector)

    def _output(self) -> None:
        """The stub says which vector came; what is opened as a path in the kernel does not come here any more."""
        kvm = self.kvm
        port = kvm.run16[abi.RUN_IO_PORT // 2]
        vector = kvm.run8[kvm.run64[abi.RUN_IO_DATA_OFFSET // 8]]
        if port != stub.PORT + self.index or not kvm.run8[abi.RUN_IO_DIRECTION]:
            self._recover(f"access to port {port:#x}")
        elif vector == stub.NMI_VECTOR:
            self.counters[GHOST_NMIS] += 1
            events = bytearray(kvm.get_events())
            events[_EVENTS_NMI_MASKED] = 0
            events[_EVENTS_FLAGS : _EVENTS_FLAGS + 4] = bytes(4)
            kvm.set_events(bytes(events))
            self._report(GHOST_NMI, self.index, vector)
        elif vector >= stub.FIRST_VECTOR:
            self._report(GHOST_INTERRUPT, self.index, vector)
        else:
            self._recover(f"exception {vector}")

    def _trapped(self) -> None:
        """INIT and SIPI came again, or the trap went off within the stub."""
        sregs = self.kvm.get_sregs()
        regs = self.kvm.get_regs()
        if not stub.runs_stub(regs, sregs):
            self._started(sregs)
            return
        self._arm()
        self.kvm.set_regs(_without_trap_flag(regs))

    def _look(self) -> bool:
        """Put it back if it was led out of the stub; True if it was."""
        if not self.is_stub or self.kvm.get_mp_state() == abi.MP_STATE_INIT_RECEIVED:
            return False
        regs, sregs = self.kvm.get_regs(), self.kvm.get_sregs()
        if stub.is_sound(regs, sregs, self.index):
            return False
        if stub.is_starting(regs, sregs):
            self._started(sregs)  # the kick came between the SIPI and the trap
        else:
            self._recover("it ran other code than the stub")
        return True

    # ------------------------------------------------------------ what is in it

    def _stopped(self) -> str:
        """What it holds can only come out of it by the stub: one that a guest led astray is put back first."""
        if self.kvm.get_mp_state() == abi.MP_STATE_INIT_RECEIVED:
            self._tell_init()
            return IDLE
        return BUSY if self.is_stub and (self._look() or self._is_busy()) else IDLE

    def _tell_init(self) -> None:
        """The real vCPU is to have the INIT before its state is saved. It comes again with the SIPI, without harm."""
        if not self._init_told:
            self._init_told = True
            self._report(GHOST_INIT, self.index, 0)

    def _is_busy(self) -> bool:
        """Is an interrupt or an NMI on its way through the stub?"""
        _, _, mp_state, requested, in_service, nmis = self.quiescence()
        if in_service and mp_state == abi.MP_STATE_HALTED:
            # The guest has written to its word of PV_EOI_MSR.
            self._recover("it has left out the end of an interrupt")
        return bool(requested or in_service or nmis)

    def _is_forwarding(self) -> bool:
        return self.is_stub and stub.is_forwarding(self.kvm.get_regs())

    def quiescence(self) -> QuiescentGhost:
        """Read what it holds; while it is not running."""
        events = self.kvm.get_events()
        lapic = self.kvm.get_lapic()
        mp_state = self.kvm.get_mp_state()
        in_service = len(abi.apic_vectors(lapic, abi.APIC_ISR))
        if not in_service and mp_state == abi.MP_STATE_RUNNABLE and self._is_forwarding():
            in_service = 1
        return QuiescentGhost(
            self.index,
            self.is_stub,
            mp_state,
            len(abi.apic_vectors(lapic, abi.APIC_IRR)),
            in_service,
            events[_EVENTS_NMI_INJECTED] + min(events[_EVENTS_NMI_PENDING], 2),
        )

    def _recover(self, text: str) -> None:
        """Put it back into the stub. What was being delivered is passed on, what its LAPIC has requested stays."""
        now = time.monotonic_ns()
        self.counters[GHOST_RECOVERIES] += 1
        self._recovery_times = [each for each in self._recovery_times if now - each < RECOVERY_WINDOW_NS] + [now]
        where = stub.where(self.kvm.get_regs(), self.kvm.get_sregs())
        self._settle()
        in_service = abi.apic_vectors(self.kvm.get_lapic(), abi.APIC_ISR)
        for vector in in_service:
            self._report(GHOST_INTERRUPT, self.index, vector)
        if self.kvm.get_events()[_EVENTS_NMI_INJECTED]:
            self.counters[GHOST_NMIS] += 1
            self._report(GHOST_NMI, self.index, stub.NMI_VECTOR)
        self._place()
        # Not by KVM_SET_LAPIC: that would take back what comes meanwhile.
        self.kvm.set_msrs((_END_OF_INTERRUPT,) * len(in_service) + self._lapic_settings)
        text = f"the ghost of vCPU {self.index} left its stub ({text}: {where}) and was put back"
        if len(self._recovery_times) >= MAX_RECOVERIES:
            raise GhostError(f"{text}, {len(self._recovery_times)} times within a second: the guest damages it")
        self._recovered(self.index, text)

    def _settle(self) -> None:
        """Let KVM finish the exit that is open; what it would do at the next KVM_RUN must not meet the stub."""
        try:
            self.kvm.touch()
        except KvmError:
            pass
        if self._stop:
            self.kvm.run8[abi.RUN_IMMEDIATE_EXIT] = 1


def _without_trap_flag(regs: bytes) -> bytes:
    values = list(abi.REGS.unpack(regs))
    values[abi.REGS_NAMES.index("rflags")] &= ~0x100
    return abi.REGS.pack(*values)


def _lapic_settings(lapic: bytes) -> tuple[MsrValue, ...]:
    return tuple(
        MsrValue(abi.x2apic_msr(register), int.from_bytes(lapic[register : register + 4], "little"))
        for register in _LAPIC_SETTINGS
    )
