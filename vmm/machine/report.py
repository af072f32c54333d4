"""What clients are told of a microVM: GET /, and GET /vcpus.

``exits`` of a vCPU are those that were answered until the last heartbeat. ``ghosts`` are those of its worker (the
worker's other vCPUs show the same). Both are read from shared memory, which the worker writes.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence
from ipc.exit_ring import COUNTER_EXITS, GHOST_EXITS, GHOST_NMIS, GHOST_RECOVERIES, GHOST_STARTUPS, GHOST_STUB
from vmm.cells.exits import ExitExecutor
from vmm.cells.worker import Worker
from vmm.placement import Placement

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


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


def vcpu_report(
    workers: Sequence[tuple[int, Worker]],
    placement: Placement,
    executors: Mapping[int, ExitExecutor],
    is_stalled: Callable[[Worker], bool],
    replacements: Callable[[int], int],
) -> list[JsonValue]:
    """Return one record per vCPU. ``workers`` are (vCPU, its worker) in order of the vCPUs."""
    return [
        {
            "index": vcpu,
            "worker": worker.index,
            "pid": worker.pid,
            "placement": placement.kind,
            "state": "stalled" if is_stalled(worker) else worker.state.value,
            "exits": executors[vcpu].counters()[COUNTER_EXITS],
            "affinity": list(placement.affinity[vcpu]) if placement.affinity else None,
            "clock_ahead_ns": worker.clock_ahead_ns,
            "ghosts": [
                _ghost(ghost, executors[worker.assignment.vcpus[0]].ghost_counters(ghost))
                for ghost in worker.assignment.ghosts
            ],
            "replacements": replacements(worker.index),
        }
        for vcpu, worker in workers
    ]


def _ghost(vcpu: int, counters: Sequence[int]) -> dict[str, JsonValue]:
    return {
        "vcpu": vcpu,
        "stub": bool(counters[GHOST_STUB]),
        "exits": counters[GHOST_EXITS],
        "startups": counters[GHOST_STARTUPS],
        "nmis": counters[GHOST_NMIS],
        "recoveries": counters[GHOST_RECOVERIES],
    }
