"""From a CPU template to what workers are configured with: the same for all of them.

The controller changes the CPUID that a worker reports; the worker makes each vCPU's own from that (topology), and
changes the MSRs, whose values only it can read.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Callable, Iterable, NamedTuple, Sequence
from ipc.messages.records import MAX_TEMPLATE_ITEMS, CapabilityDemand, CpuidEntry, MsrChange
from vmm.cpu_config.static_templates import check_permitted, static_template
from vmm.errors import VmmError

if TYPE_CHECKING:
    from vmm.cpu_config.template import CpuidModifier, CustomCpuTemplate, KvmCapability, MsrModifier


class CpuTemplateError(VmmError):
    """The CPU template cannot be applied on this host."""

    code = "vmm.cpu_template"

    def __init__(self, text: str) -> None:
        super().__init__(f"System configuration error: Failed to create guest config: {text}")


class CpuSetup(NamedTuple):
    """The fields of ``ipc.messages.worker.Configure`` that come from the CPU template."""

    cpuid: tuple[CpuidEntry, ...] = ()
    msr_changes: tuple[MsrChange, ...] = ()
    capabilities: tuple[CapabilityDemand, ...] = ()


def cpu_setup(
    static_name: str | None, custom: CustomCpuTemplate | None, read_host: Callable[[], Sequence[CpuidEntry]]
) -> CpuSetup:
    """Return what the template comes to on this host, whose CPUID ``read_host`` returns (called only if it matters).

    Raises StaticTemplateError, CpuTemplateError, and what ``read_host`` raises.
    """
    template = custom
    host: Sequence[CpuidEntry] = ()
    if static_name is not None:
        host = read_host()
        check_permitted(static_name, host)
        template = static_template(static_name)
    if template is None:
        return CpuSetup()
    cpuid: tuple[CpuidEntry, ...] = ()
    if template.cpuid_modifiers:
        cpuid = changed_cpuid(host or read_host(), template.cpuid_modifiers)
    return CpuSetup(cpuid, _msr_changes(template.msr_modifiers), _capabilities(template.kvm_capabilities))


def changed_cpuid(host: Iterable[CpuidEntry], modifiers: Iterable[CpuidModifier]) -> tuple[CpuidEntry, ...]:
    """Return the host's CPUID after the changes. Raises CpuTemplateError for a leaf that KVM does not have."""
    leaves = {(entry.leaf, entry.subleaf): entry for entry in host}
    for modifier in modifiers:
        entry = leaves.get((modifier.leaf, modifier.subleaf))
        if entry is None:
            raise CpuTemplateError(
                f"Template changes a CPUID entry not supported by KVM: Leaf: {modifier.leaf:x}, "
                f"Subleaf: {modifier.subleaf:x}"
            )
        values = entry._asdict()
        for register, bitmap in modifier.modifiers:
            values[register] = bitmap.apply(values[register])
        values["flags"] = modifier.flags
        leaves[modifier.leaf, modifier.subleaf] = CpuidEntry(**values)
    return tuple(leaves.values())


def _msr_changes(modifiers: Iterable[MsrModifier]) -> tuple[MsrChange, ...]:
    """One change per register: a later modifier has the last word on the bits that it names."""
    changes: dict[int, MsrChange] = {}
    for register, bitmap in modifiers:
        before = changes.get(register, MsrChange(register, 0, 0))
        changes[register] = MsrChange(register, before.mask | bitmap.filter, bitmap.apply(before.value))
    _check_count(len(changes), "MSRs")
    return tuple(changes.values())


def _capabilities(modifiers: Iterable[KvmCapability]) -> tuple[CapabilityDemand, ...]:
    """One demand per capability: what is both added and removed is required."""
    demands: dict[int, bool] = {}
    for number, required in modifiers:
        demands[number] = required or demands.get(number, False)
    _check_count(len(demands), "KVM capabilities")
    return tuple([CapabilityDemand(number, required) for number, required in demands.items()])


def _check_count(count: int, what: str) -> None:
    if count > MAX_TEMPLATE_ITEMS:
        raise CpuTemplateError(f"The template names {count} {what}; {MAX_TEMPLATE_ITEMS} are possible")
