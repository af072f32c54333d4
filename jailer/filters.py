"""The system call filters of a launch: loaded while the process is still on the host, installed by the cells."""

from __future__ import annotations

from itertools import pairwise

from base.lean_typing import NamedTuple
from ipc.launch_plan import ROLE_DEVICE, ROLE_SUPERVISOR, ROLE_VCPU, ROLE_VMM, SECCOMP_OFF, SECCOMP_REPORT
from jailer.errors import PolicyError
from jailer.seccomp.install import Filter, load

#: The stages of a cell's walls (jailer.cell): from its fork on, and when it needs no more than a running machine does.
SETUP, RUNNING = "setup", "running"
STAGES = (SETUP, RUNNING)
_STAGED = (ROLE_VMM, ROLE_VCPU, ROLE_DEVICE)
#: Policies whose filters a launch needs: the supervisor has one, all other cells one for each stage.
ROLES = (ROLE_SUPERVISOR, *(policy for role in _STAGED for policy in (f"{role}-{SETUP}", role)))
JANITOR = "janitor"


class Filters(NamedTuple):
    """The filter of each policy, and what is to be said of them; ``by_role`` is empty if seccomp is off."""

    mode: str
    by_role: dict[str, Filter]
    warning: str


def of_cell(by_role: dict[str, Filter], role: str) -> dict[str, Filter]:
    """Return the filters of a cell but the supervisor by stage; none if seccomp is off."""
    policies = {SETUP: f"{role}-{SETUP}", RUNNING: role}
    return {stage: by_role[policy] for stage, policy in policies.items() if policy in by_role}


def load_filters(mode: str, *, with_faults: bool = False) -> Filters:
    """Load the filters of every role; with armed faults, those that let a fault act. Raises PolicyError."""
    if mode == SECCOMP_OFF:
        return Filters(mode, {}, "")
    if mode == SECCOMP_REPORT:
        import jailer.seccomp.names  # noqa: F401  needed in the jail, where nothing can be imported

    by_role, warning = load((*ROLES, JANITOR), mode, "-faults" if with_faults else "")
    return Filters(mode, by_role, warning)


def custom_filter(arguments: tuple[str, ...]) -> str:
    """Return the path of the custom filter that a controller's command line names, or an empty string."""
    return dict(pairwise(arguments)).get("--seccomp-filter", "")


def with_custom(filters: Filters, path: str, directory: int | None = None) -> Filters:
    """Add a custom filter to what running cells may do. ``directory``, if there is one, is the root for ``path``.

    Raises PolicyError.
    """
    if filters.mode == SECCOMP_OFF:
        raise PolicyError("a custom seccomp filter cannot be used while seccomp is switched off")
    from jailer.seccomp import custom

    programs = custom.read(path, directory)
    added = {
        role: custom.add(filters.by_role[role], [(name, programs[name]) for name in names])
        for role, names in custom.OF_ROLE.items()
    }
    return filters._replace(by_role={**filters.by_role, **added})
