"""The system call filters of a launch: loaded while the process is still on the host, installed by the cells."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import ROLE_SUPERVISOR, ROLE_VCPU, ROLE_VMM, SECCOMP_OFF, SECCOMP_REPORT
from jailer.seccomp.install import Filter, load

ROLES = (ROLE_SUPERVISOR, ROLE_VMM, ROLE_VCPU)
JANITOR = "janitor"


class Filters(NamedTuple):
    """Which filter each role gets, and what is to be said of them; ``by_role`` is empty if seccomp is off."""

    mode: str
    by_role: dict[str, Filter]
    warning: str


def load_filters(mode: str, *, janitor: bool, with_faults: bool = False) -> Filters:
    """Load the filters of every role; with armed faults, those that let a fault act. Raises PolicyError."""
    if mode == SECCOMP_OFF:
        return Filters(mode, {}, "")
    if mode == SECCOMP_REPORT:
        import jailer.seccomp.names  # noqa: F401  needed in the jail, where nothing can be imported

    by_role, warning = load((*ROLES, JANITOR) if janitor else ROLES, mode, "-faults" if with_faults else "")
    return Filters(mode, by_role, warning)
