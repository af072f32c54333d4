"""What a ghost does where the LAPICs are KVM's own: a host whose ring 0 is emulated may lack some of it."""

from __future__ import annotations

from ipc.messages.ghosts import GHOST_INTERRUPT
from tests.harness.ghost_bench import VECTOR
from tests.kvm.test_ghost import test_interrupts_that_come_while_a_ghost_is_put_back_are_passed_on  # noqa: F401
from vcpu_worker.ghosts import stub


def test_an_interrupt_whose_end_the_guest_has_taken_away_does_not_stay(bench, monkeypatch):
    """The guest can write to the word that says whether the end of an interrupt needs an exit."""
    monkeypatch.setattr(stub, "pv_eoi", lambda ghost: 0)  # KVM itself leaves it alone
    bench.do(bench.ghost.place_stub)
    bench.machine._stub._mapping[stub.CODE_SIZE + stub.STACK_SIZE] = 1
    bench.run()
    bench.send(VECTOR)
    bench.expect(GHOST_INTERRUPT, 1, VECTOR)
    bench.park()
    bench.turn(0)
    assert len(bench.recovered) == 1 and "left out the end of an interrupt" in bench.recovered[0]
    assert (bench.quiescence().requested, bench.quiescence().in_service) == (0, 0)
    bench.told.clear()  # the recovery passes on what was in service
    bench.run()
    bench.send(VECTOR)
    bench.expect(GHOST_INTERRUPT, 1, VECTOR)
    bench.park()
    bench.turn(0)
    assert len(bench.recovered) == 1
