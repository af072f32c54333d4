"""One JSON line per cell in the wall log, if there is one: the walls asked for and found, the filter's digest."""

from __future__ import annotations

import select

from ipc.launch_plan import ROLE_VCPU, cell_name
from jailer import verify
from jailer.cell_record import Setup

#: How long a process that is being killed may take to be dead.
DYING_MS = 100


def compare(setup: Setup, role: str, index: int, pid: int, pidfd: int) -> list[str] | None:
    """Compare a process with its walls, write the line if it is wanted, return the differences.

    None if the process (``pidfd``, -1 for ourselves) died meanwhile: a dead process has no walls.
    """
    plan = setup.plan
    asked = setup.asked
    if role == ROLE_VCPU:
        asked = asked._replace(cgroup=setup.worker_cgroups.membership(index, asked.cgroup))
    wanted = verify.asked(plan, role, asked)
    actual = verify.found(pid, setup.proc, setup.asked.host, wanted)
    differences = verify.differences(wanted, actual)
    if differences and pidfd >= 0 and _ended(pidfd):
        return None
    if not setup.log.reports:
        return differences
    chosen = setup.filters.get(role)
    setup.log.record(
        {
            "walls": cell_name(role, index),
            "pid": pid,
            "verified": not differences,
            "differences": differences,
            "switched_off": list(plan.switched_off),
            "seccomp": {"mode": plan.seccomp, "sha256": chosen.digest if chosen is not None else None},
            "asked": wanted,
            "found": actual,
        }
    )
    return differences


def _ended(pidfd: int) -> bool:
    """Has this process ended, or is it about to?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(DYING_MS))
