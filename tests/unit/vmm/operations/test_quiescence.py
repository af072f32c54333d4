"""What keeps a microVM from being at rest is said, each thing for itself."""

from __future__ import annotations

import pytest

from ipc.messages.ghosts import GhostAtRest
from vmm.operations.quiescence import unrest
from vmm.snapshot.state_file import WorkerAtRest

QUIET = GhostAtRest(1, True, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (WorkerAtRest(0, 0, 0, (QUIET,)), ""),
        (WorkerAtRest(0, 2, 0, ()), "2 open events"),
        (WorkerAtRest(0, 0, 1, ()), "1 open exits"),
        (WorkerAtRest(0, 0, 0, (QUIET._replace(requested=1),)), "1 interrupts in the ghost of vCPU 1"),
        (
            WorkerAtRest(0, 0, 0, (QUIET, QUIET._replace(vcpu=2, in_service=1, nmis=1))),
            "2 interrupts in the ghost of vCPU 2",
        ),
    ],
)
def test_unrest(worker, text):
    assert unrest(worker) == text
