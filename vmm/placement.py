"""Which worker runs which vCPUs, and on which host CPUs: one policy, decided once per microVM.

*Split*: every vCPU has a worker of its own. *Grouped*: one worker runs all of them as threads. Anything between is
written as groups: ``0,1/2,3`` is two workers of two vCPUs each. Split needs second-stage paging in hardware: without
it a worker's VM does not see what another one's vCPUs change in the guest's page tables.

The affinity (``vcpu_affinity`` of PUT /machine-config) has one list of host CPUs per vCPU, in order, separated by
``/``; a list is written as in the kernel's cpulists: ``2/3/4-5,7/4-5,7``.
"""

from __future__ import annotations

from base.lean_typing import Iterable, NamedTuple, Sequence
from ipc.launch_plan import (
    MAX_AFFINITY,
    MAX_HOST_CPUS,
    PLACEMENT_GROUPED,
    PLACEMENT_SPLIT,
    Assignment,
    LaunchPlan,
)
from vmm.errors import VmmError

AUTOMATIC = "Automatic"
SPLIT = "Split"
GROUPED = "Grouped"
MIXED = "Mixed"

_GROUP_SEPARATOR = "/"
_VCPU_SEPARATOR = ","
#: Longest text that can name 32 vCPUs in groups.
_MAX_TEXT = 128

#: Takes an affinity that was set away again.
ANY = "Any"

_AFFINITY_SEPARATOR = "/"
_LIST_SEPARATOR = ","
_RANGE_SEPARATOR = "-"
#: Longest text that is read.
_MAX_AFFINITY_TEXT = 4096

Affinity = tuple[tuple[int, ...], ...]


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

    def destination(self, apic_id: int) -> int:
        """Return the number of the worker that runs the vCPU with this APIC id (they are the same), -1 for none."""
        return next((worker for worker, group in enumerate(self.groups) if apic_id in group), -1)


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


class AffinityError(VmmError):
    """An affinity that cannot be read, does not fit the vCPU count, or names CPUs that the host does not give us."""

    code = "vmm.affinity"


def parse_affinity(text: str | None, vcpu_count: int, available: Sequence[int] = ()) -> Affinity:
    """Return the host CPUs of each vCPU, in ascending order; nothing if no affinity is wanted.

    ``available`` are the host CPUs that this microVM may use, in ascending order; not checked if it is empty. Raises
    AffinityError.
    """
    if text is None or text == ANY:
        return ()
    lists = text[: _MAX_AFFINITY_TEXT + 1].split(_AFFINITY_SEPARATOR)
    if len(text) > _MAX_AFFINITY_TEXT or len(lists) != vcpu_count:
        raise AffinityError(
            f"The vCPU affinity is {ANY}, or a list of host CPUs for each of the {vcpu_count} vCPUs, such as "
            f"{_AFFINITY_SEPARATOR.join(['0', '1', '2-3,5'][:vcpu_count])}."
        )
    affinity = tuple(_cpus(each, vcpu) for vcpu, each in enumerate(lists))
    lacking = sorted({cpu for cpus in affinity for cpu in cpus}.difference(available)) if available else []
    if lacking:
        raise AffinityError(
            f"The vCPU affinity names host CPU {cpulist(lacking)}; this microVM may use {cpulist(available)}."
        )
    return affinity


def cpulist(cpus: Iterable[int]) -> str:
    """Write CPUs, given in ascending order, as a cpulist."""
    ranges: list[tuple[int, int]] = []
    for cpu in cpus:
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1] = (ranges[-1][0], cpu)
        else:
            ranges.append((cpu, cpu))
    return _LIST_SEPARATOR.join(f"{low}" if low == high else f"{low}{_RANGE_SEPARATOR}{high}" for low, high in ranges)


def _cpus(text: str, vcpu: int) -> tuple[int, ...]:
    cpus: set[int] = set()
    for part in text.split(_LIST_SEPARATOR):
        low, dash, high = part.partition(_RANGE_SEPARATOR)
        if not _is_cpu_number(low) or (dash and not _is_cpu_number(high)):
            raise AffinityError(f"The host CPUs of vCPU {vcpu} are a list such as 2,4-5; this is none: {part[:20]!r}.")
        first, last = int(low), int(high or low)
        if not first <= last < MAX_HOST_CPUS:
            raise AffinityError(
                f"The host CPUs of vCPU {vcpu}: {part} is no range of numbers below {MAX_HOST_CPUS}, lowest first."
            )
        cpus.update(range(first, last + 1))
    if len(cpus) > MAX_AFFINITY:
        raise AffinityError(f"The host CPUs of vCPU {vcpu} are more than {MAX_AFFINITY}.")
    return tuple(sorted(cpus))


def _is_cpu_number(text: str) -> bool:
    return 0 < len(text) <= 4 and text.isascii() and text.isdigit()
