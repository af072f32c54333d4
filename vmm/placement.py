"""Which worker runs which vCPUs: one policy, decided once per microVM.

*Split*: every vCPU has a worker of its own. *Grouped*: one worker runs all of them as threads. Anything between is
written as groups: ``0,1/2,3`` is two workers of two vCPUs each. Split needs second-stage paging in hardware: without
it a worker's VM does not see what another one's vCPUs change in the guest's page tables.
"""

from __future__ import annotations

from ipc.plan import PLACEMENT_GROUPED, PLACEMENT_SPLIT, Assignment, LaunchPlan
from ipc.typed import NamedTuple
from vmm.affinity import Affinity
from vmm.errors import VmmError

AUTOMATIC = "Automatic"
SPLIT = "Split"
GROUPED = "Grouped"
MIXED = "Mixed"

_GROUP_SEPARATOR = "/"
_VCPU_SEPARATOR = ","
#: Longest text that can name 32 vCPUs in groups.
_MAX_TEXT = 128


class PlacementError(VmmError):
    """A placement that cannot be read or does not fit the vCPU count."""

    code = "vmm.placement"


class Placement(NamedTuple):
    """``groups[n]`` are the vCPUs of worker n. ``kind`` is Split, Grouped or Mixed; ``reason``: why it was chosen.

    ``affinity[n]`` are the host CPUs of vCPU n; empty: all that the microVM may use.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    reason: str
    affinity: Affinity = ()

    def assignment(self, worker: int) -> Assignment:
        """Return what a worker is forked for."""
        mine = self.groups[worker]
        others = tuple(sorted(each for group in self.groups for each in group if each not in mine))
        return Assignment(worker, mine, others, tuple(self.affinity[each] for each in mine) if self.affinity else ())

    def owner(self, vcpu: int) -> int:
        """Return the number of the worker that runs a vCPU."""
        for worker, group in enumerate(self.groups):
            if vcpu in group:
                return worker
        raise PlacementError(f"There is no vCPU {vcpu}.")


def check(text: str, vcpu_count: int) -> None:
    """Raise PlacementError if ``text`` is no placement for so many vCPUs."""
    if text not in (AUTOMATIC, SPLIT, GROUPED):
        _groups(text, vcpu_count)


def decide(text: str | None, vcpu_count: int, plan: LaunchPlan, affinity: Affinity = ()) -> Placement:
    """Return the placement for ``vcpu_count`` vCPUs; ``text`` is None if the client has not asked for one.

    Raises PlacementError.
    """
    if text is None or text == AUTOMATIC:
        kind = SPLIT if plan.placement == PLACEMENT_SPLIT else GROUPED
        return Placement(kind, _uniform(kind, vcpu_count), plan.placement_reason, affinity)
    if text in (SPLIT, GROUPED):
        return Placement(text, _uniform(text, vcpu_count), "asked for", affinity)
    groups = _groups(text, vcpu_count)
    kind = {1: GROUPED, vcpu_count: SPLIT}.get(len(groups), MIXED)
    return Placement(kind, groups, "asked for", affinity)


def warning(placement: Placement, plan: LaunchPlan) -> str:
    """Say what may go wrong with this placement on this host, or nothing."""
    if len(placement.groups) == 1 or plan.placement != PLACEMENT_GROUPED:
        return ""
    return (
        "vCPUs in different workers need second-stage paging (EPT, NPT), which this host does not have for certain "
        f"({plan.placement_reason}): a guest that changes its page tables will see stale ones."
    )


def _uniform(kind: str, vcpu_count: int) -> tuple[tuple[int, ...], ...]:
    if kind == GROUPED:
        return (tuple(range(vcpu_count)),)
    return tuple((vcpu,) for vcpu in range(vcpu_count))


def _groups(text: str, vcpu_count: int) -> tuple[tuple[int, ...], ...]:
    """Read groups. Groups and the vCPUs in them may come in any order; worker 0 runs vCPU 0."""
    numbers = [part.split(_VCPU_SEPARATOR) for part in text[:_MAX_TEXT].split(_GROUP_SEPARATOR)]
    if len(text) > _MAX_TEXT or not all(_is_number(each) for group in numbers for each in group):
        raise PlacementError(
            f"The vCPU placement is {AUTOMATIC}, {SPLIT}, {GROUPED}, or groups of vCPU numbers such as 0,1/2,3."
        )
    groups = sorted(tuple(sorted(int(each) for each in group)) for group in numbers)
    placed = sorted(each for group in groups for each in group)
    if placed != list(range(vcpu_count)):
        raise PlacementError(f"The vCPU placement must name each vCPU from 0 to {vcpu_count - 1} exactly once.")
    return tuple(groups)


def _is_number(text: str) -> bool:
    return len(text) <= 2 and text.isascii() and text.isdigit()
