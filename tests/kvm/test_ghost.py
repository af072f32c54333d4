"""One ghost in a VM of its own: what it tells of, and what it holds when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipc.messages.ghosts import GHOST_INIT, GHOST_INTERRUPT, GHOST_NMI, GHOST_STARTUP, QuiescentGhost
from tests.harness.ghost_bench import VECTOR, Bench
from vcpu_worker.ghosts import stub
from vcpu_worker.ghosts.ghost import _EVENTS_NMI_INJECTED, BUSY, IDLE
from vcpu_worker.kvm import abi

INIT, SIPI, NMI = 0x4500, 0x4600, 0x400
IN_SERVICE = 0x41


def test_a_ghost_that_is_stopped_between_init_and_sipi_says_so_once(bench):
    bench.run()
    bench.send(INIT)
    while bench.stop() == IDLE and not bench.told:  # the INIT may not have been taken yet
        bench.run()
    bench.expect(GHOST_INIT, 1, 0)
    assert bench.quiescence() == QuiescentGhost(1, False, abi.MP_STATE_INIT_RECEIVED, 0, 0, 0)
    bench.run()
    assert bench.stop() == IDLE
    assert not bench.told
    bench.do(bench.ghost.place_stub)  # another processor's start must not make it forget the INIT
    assert not bench.ghost.is_stub
    bench.run()
    bench.send(SIPI | 0x70)
    bench.expect(GHOST_STARTUP, 1, 0x70)
    assert bench.stop() in (IDLE, BUSY)
    assert (
        bench.quiescence() == QuiescentGhost(1, True, abi.MP_STATE_HALTED, 0, 0, 0) or bench.quiescence().mp_state == 0
    )
    # Once more, from the stub.
    bench.run()
    bench.send(INIT)
    while bench.stop() == IDLE and not bench.told:
        bench.run()
    bench.expect(GHOST_INIT, 1, 0)
    assert bench.quiescence().mp_state == abi.MP_STATE_INIT_RECEIVED


def test_what_a_stopped_ghost_holds_is_counted(bench):
    bench.do(bench.ghost.place_stub)
    bench.send(VECTOR)
    bench.send(VECTOR + 1)
    bench.send(NMI)
    held = bench.quiescence()
    assert (held.requested, held.in_service, held.nmis) == (2, 0, 1)
    bench.run()
    bench.await_(lambda: len(bench.told) == 3)
    bench.park()
    assert sorted(bench.told) == [(GHOST_INTERRUPT, 1, VECTOR), (GHOST_INTERRUPT, 1, VECTOR + 1), (GHOST_NMI, 1, 2)]
    held = bench.quiescence()
    assert (held.requested, held.in_service, held.nmis) == (0, 0, 0)


def test_a_vector_that_no_processor_takes_does_not_keep_a_ghost_busy(bench):
    bench.do(bench.ghost.place_stub)
    bench.send(5)
    bench.run()
    assert bench.stop() == IDLE
    assert bench.quiescence().requested == 0
    assert not bench.told
    assert not bench.recovered


def test_interrupts_that_come_while_a_ghost_is_put_back_are_passed_on(bench, monkeypatch):
    """One comes after each thing that its worker asks of KVM meanwhile; others wait, or are in service, before."""
    bench.do(bench.ghost.place_stub)
    kvm = bench.ghost.kvm
    settings = bench.do(kvm.get_lapic)[abi.APIC_LVTT : abi.APIC_LVTT + 4]
    lead_astray(bench)
    sent: list[int] = []

    def send_one() -> None:
        sent.append(VECTOR + len(sent))
        bench.send(sent[-1])

    for name in ("_get", "_set", "set_msrs"):
        monkeypatch.setattr(kvm, name, _then(getattr(kvm, name), send_one))
    send_one()
    bench.ghost.ask_to_stop()
    assert bench.do(bench.ghost.run) == BUSY
    monkeypatch.undo()
    bench.run()
    bench.await_(lambda: len(bench.told) >= len(sent) + 2)
    bench.park()
    bench.turn(0)
    assert len(bench.recovered) == 1 and "other code than the stub" in bench.recovered[0]
    assert 10 < len(sent) < 100
    interrupts = [(GHOST_INTERRUPT, 1, vector) for vector in (IN_SERVICE, *sent)]
    assert sorted(bench.told) == sorted([*interrupts, (GHOST_NMI, 1, 2)])
    assert bench.quiescence() == QuiescentGhost(1, True, abi.MP_STATE_HALTED, 0, 0, 0)
    assert bench.do(kvm.get_lapic)[abi.APIC_LVTT : abi.APIC_LVTT + 4] == settings


def lead_astray(bench: Bench) -> None:
    """Into a loop in the page of stacks; an interrupt is in service, an NMI being delivered, timer and priority set."""
    ghost, kvm = bench.ghost, bench.ghost.kvm
    assert ghost.is_stub and bench.machine._stub is not None
    bench.machine._stub._mapping[stub.CODE_SIZE : stub.CODE_SIZE + 2] = b"\xeb\xfe"

    def lead() -> None:
        registers = list(abi.REGS.unpack(kvm.get_regs()))
        registers[abi.REGS_NAMES.index("rip")] = stub.STACKS
        kvm.set_regs(abi.REGS.pack(*registers))
        lapic = bytearray(kvm.get_lapic())
        lapic[abi.APIC_ISR + 16 * (IN_SERVICE // 32) + IN_SERVICE % 32 // 8] = 1 << IN_SERVICE % 8
        lapic[abi.APIC_TPR] = 0xF0
        lapic[abi.APIC_LVTT : abi.APIC_LVTT + 4] = (2 << 16 | VECTOR).to_bytes(4, "little")
        kvm.set_lapic(lapic)
        events = bytearray(kvm.get_events())
        events[_EVENTS_NMI_INJECTED] = 1
        kvm.set_events(bytes(events))

    bench.do(lead)


def _then(first: Callable[..., Any], second: Callable[[], None]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        result = first(*arguments)
        second()
        return result

    return both
