"""What clients are told of a microVM: GET /, and what GET /vcpus shows of the workers' ghosts.

``exits`` of a vCPU are those that were answered until the last heartbeat. ``ghosts`` are those of its worker (the
worker's other vCPUs show the same); null if the worker does not answer.
"""

from __future__ import annotations

import time

from base.event_manager import EventManager
from base.lean_typing import TYPE_CHECKING, Any, NamedTuple, Sequence
from ipc.messages.ghosts import GhostsReported, ReportGhosts
from vmm.cells.lifecycle import SECOND_NS
from vmm.cells.worker import Worker
from vmm.errors import VmmError

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

#: How long the client waits for a worker's counters.
REPORT_TIMEOUT_NS = 1 * SECOND_NS


class InstanceInfo(NamedTuple):
    """What GET / reports; ``state`` is Not started, Running or Paused.

    Calling it returns it: clients of ``Vmm`` may write the attribute with or without brackets.
    """

    id: str
    state: str
    vmm_version: str
    app_name: str

    def __call__(self) -> InstanceInfo:
        """Return it."""
        return self


def ghost_counters(workers: Sequence[Worker], events: EventManager) -> dict[int, JsonValue]:
    """Ask every worker for the counters of its ghosts; one that does not answer soon is left out."""
    counters: dict[int, JsonValue] = {}
    asked: set[int] = set()
    for worker in workers:
        if not worker.assignment.ghosts:
            counters[worker.index] = []
            continue

        def answered(reply: Any, index: int = worker.index) -> None:
            if isinstance(reply, GhostsReported):
                counters[index] = [each._asdict() for each in reply.ghosts]

        try:
            worker.submit(ReportGhosts(), answered)  # an answer may come while the next worker is being asked
            asked.add(worker.index)
        except VmmError:
            pass  # it has failed or ended, which its state says
    events.run_until(lambda: asked <= counters.keys(), time.monotonic_ns() + REPORT_TIMEOUT_NS)
    return dict(counters)  # an answer that comes too late changes nothing any more
