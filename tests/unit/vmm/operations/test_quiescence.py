"""What keeps a microVM from being quiescent is said, each thing for itself."""

from __future__ import annotations

import pytest

from ipc.messages.ghosts import QuiescentGhost
from vmm.operations.quiescence import QuiescentWorker, busy_with, not_quiescent

QUIET = QuiescentGhost(1, True, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (QuiescentWorker(0, 0, 0, (QUIET,)), ""),
        (QuiescentWorker(0, 2, 0, ()), "2 open events"),
        (QuiescentWorker(0, 0, 1, ()), "1 open exits"),
        (QuiescentWorker(0, 0, 0, (QUIET._replace(requested=1),)), "1 interrupts in the ghost of vCPU 1"),
        (
            QuiescentWorker(0, 0, 0, (QUIET, QUIET._replace(vcpu=2, in_service=1, nmis=1))),
            "2 interrupts in the ghost of vCPU 2",
        ),
    ],
)
def test_busy_with(worker, text):
    assert busy_with(worker) == text


def test_what_is_held_is_said_in_a_sentence():
    assert not_quiescent(QuiescentWorker(0, 0, 0, (QUIET,))) == ""
    assert not_quiescent(QuiescentWorker(1, 2, 0, ())) == (
        "The microVM is not at rest: worker vcpu 1 holds 2 open events."
    )
