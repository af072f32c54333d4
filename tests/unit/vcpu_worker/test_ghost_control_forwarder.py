"""What ghosts report is forwarded once at a time, bounded, and nothing is forgotten."""

from __future__ import annotations

import random
from collections import Counter

from ipc.messages.ghosts import GHOST_INTERRUPT, GhostEvent
from vcpu_worker.ghost_control import MAX_OPEN_EVENTS, Forwarder


def test_an_event_that_comes_again_meanwhile_is_sent_again():
    sent: list[GhostEvent] = []
    forwarder = Forwarder(sent.append)
    for _ in range(3):
        forwarder.add(GHOST_INTERRUPT, 1, 0xFD)
    assert len(sent) == 1
    forwarder.done(*sent[0])
    assert len(sent) == 2
    assert forwarder.count
    forwarder.done(*sent[1])
    assert len(sent) == 2
    assert not forwarder.count


def test_any_order_of_events_and_answers(seed):
    """Every event is followed by a message that was sent at or after it; never too many are open."""
    chance = random.Random(seed)
    for _ in range(300):
        sent: list[GhostEvent] = []
        forwarder = Forwarder(sent.append)
        unanswered: list[GhostEvent] = []
        taken = 0
        due: Counter[tuple[int, int, int]] = Counter()
        for _ in range(200):
            if chance.random() < 0.6:
                key = (GHOST_INTERRUPT, chance.randrange(1, 4), chance.randrange(16, 40))
                due[key] = 1
                forwarder.add(*key)
            elif unanswered:
                forwarder.done(*unanswered.pop(chance.randrange(len(unanswered))))
            for event in sent[taken:]:
                assert event not in unanswered
                unanswered.append(event)
                due.pop((event.event, event.vcpu, event.vector), None)
            taken = len(sent)
            assert len(unanswered) <= MAX_OPEN_EVENTS
        while unanswered:
            forwarder.done(*unanswered.pop(0))
            unanswered += sent[taken:]
            due.subtract(())
            for event in sent[taken:]:
                due.pop((event.event, event.vcpu, event.vector), None)
            taken = len(sent)
        assert not due
        assert not forwarder.count
