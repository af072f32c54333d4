"""Which host CPUs the thread of each vCPU may use (``vcpu_affinity`` of PUT /machine-config).

One list per vCPU, in order, separated by ``/``; a list is written as in the kernel's cpulists: ``2/3/4-5,7/4-5,7``.
"""

from __future__ import annotations

from ipc.plan import MAX_AFFINITY, MAX_HOST_CPUS
from ipc.typed import Iterable, Sequence
from vmm.errors import VmmError

#: Takes an affinity that was set away again.
ANY = "Any"

_VCPU_SEPARATOR = "/"
_LIST_SEPARATOR = ","
_RANGE_SEPARATOR = "-"
#: Longest text that is read.
_MAX_TEXT = 4096

Affinity = tuple[tuple[int, ...], ...]


class AffinityError(VmmError):
    """An affinity that cannot be read, does not fit the vCPU count, or names CPUs that the host does not give us."""

    code = "vmm.affinity"


def parse(text: str | None, vcpu_count: int, available: Sequence[int] = ()) -> Affinity:
    """Return the host CPUs of each vCPU, in ascending order; nothing if no affinity is wanted.

    ``available`` are the host CPUs that this microVM may use, in ascending order; not checked if it is empty. Raises
    AffinityError.
    """
    if text is None or text == ANY:
        return ()
    lists = text[: _MAX_TEXT + 1].split(_VCPU_SEPARATOR)
    if len(text) > _MAX_TEXT or len(lists) != vcpu_count:
        raise AffinityError(
            f"The vCPU affinity is {ANY}, or a list of host CPUs for each of the {vcpu_count} vCPUs, such as "
            f"{_VCPU_SEPARATOR.join(['0', '1', '2-3,5'][:vcpu_count])}."
        )
    affinity = tuple(_cpus(each, vcpu) for vcpu, each in enumerate(lists))
    lacking = sorted({cpu for cpus in affinity for cpu in cpus}.difference(available)) if available else []
    if lacking:
        raise AffinityError(
            f"The vCPU affinity names host CPU {as_text(lacking)}; this microVM may use {as_text(available)}."
        )
    return affinity


def as_text(cpus: Iterable[int]) -> str:
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
        if not _is_number(low) or (dash and not _is_number(high)):
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


def _is_number(text: str) -> bool:
    return 0 < len(text) <= 4 and text.isascii() and text.isdigit()
