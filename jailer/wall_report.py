"""One JSON line per cell and stage in the wall log, if there is one: walls asked for and found, the filter's digest."""

from __future__ import annotations

import os
import select

from ipc.launch_plan import ROLE_SUPERVISOR, ROLE_VCPU, cell_name
from jailer import landlock, verify
from jailer.cell_record import Cell, Setup
from jailer.filters import RUNNING, SETUP, of_cell

#: How long a process that is being killed may take to be dead.
DYING_MS = 100


def compare_own(setup: Setup) -> list[str]:
    """Compare the calling process, the supervisor, with its walls; write the line, return the differences."""
    wanted = verify.asked(setup.plan, ROLE_SUPERVISOR, setup.asked)
    pid = os.getpid()
    actual = verify.found(pid, setup.proc, setup.asked.host, wanted)
    wanted["landlock"] = actual["landlock"] = setup.landlock.asked(ROLE_SUPERVISOR)  # it is in force, or we had ended
    differences = verify.differences(wanted, actual)
    _write(setup, (ROLE_SUPERVISOR, 0, pid), RUNNING, differences, asked=wanted, found=actual)
    return differences


def compare(setup: Setup, record: Cell, stage: str) -> list[str] | None:
    """Compare a cell with its walls at a stage, write the line if it is wanted, return the differences.

    None if the process died meanwhile: a dead process has no walls.
    """
    asked = setup.asked
    if record.role == ROLE_VCPU:
        asked = asked._replace(cgroup=setup.worker_cgroups.membership(record.index, asked.cgroup))
    wanted = verify.asked(setup.plan, record.role, asked, stage, assignment=record.assignment, uid=record.uid)
    if stage == SETUP:
        actual = verify.found(record.pid, setup.proc, setup.asked.host, wanted)
        wanted["landlock"] = setup.landlock.asked(record.role)
        actual["landlock"] = wanted["landlock"] if record.landlocked else landlock.describe(0)
    else:
        assert record.proc is not None
        actual = verify.found_hidden(record.pid, setup.proc, record.proc, wanted)
    differences = verify.differences(wanted, actual)
    if differences and _ended(record.pidfd):
        return None
    _write(setup, (record.role, record.index, record.pid), stage, differences, asked=wanted, found=actual)
    return differences


def _write(setup: Setup, who: tuple[str, int, int], stage: str, differences: list[str], **read: verify.Walls) -> None:
    """Write a line; ``read`` is what was asked for and what was found."""
    if not setup.log.reports:
        return
    role, index, pid = who
    plan = setup.plan
    chosen = setup.filters.get(role) if role == ROLE_SUPERVISOR else of_cell(setup.filters, role).get(stage)
    setup.log.record(
        {
            "walls": cell_name(role, index),
            "pid": pid,
            "stage": stage,
            "verified": not differences,
            "differences": differences,
            "switched_off": list(plan.switched_off),
            "unavailable": dict(setup.asked.unavailable),
            "seccomp": {"mode": plan.seccomp, "sha256": chosen.digest if chosen is not None else None},
            **read,
        }
    )


def _ended(pidfd: int) -> bool:
    """Has this process ended, or is it about to?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(DYING_MS))
