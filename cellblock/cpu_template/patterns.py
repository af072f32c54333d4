"""Templates as sets of bits: what ``strip`` and ``verify`` do, on values only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmm.cpu_config.template import (
    BitPattern,
    CpuidModifier,
    CpuidRegisterModifier,
    CustomCpuTemplate,
    KvmCapability,
    MsrModifier,
)

CPUID_BITS = 32
MSR_BITS = 64


class Place(NamedTuple):
    """Where bits are: a register of a CPUID leaf, or an MSR (``register`` is empty, ``leaf`` its number)."""

    leaf: int
    subleaf: int
    register: str

    @property
    def bits(self) -> int:
        """How many bits there are."""
        return CPUID_BITS if self.register else MSR_BITS

    def __str__(self) -> str:
        if not self.register:
            return f"MSR {self.leaf:#x}"
        return f"CPUID leaf {self.leaf:#x}, subleaf {self.subleaf:#x}, {self.register}"


class Bits:
    """A template without its order: each place once. ``flags`` are those of the leaves."""

    def __init__(self, template: CustomCpuTemplate) -> None:
        self.patterns: dict[Place, BitPattern] = {}
        self.flags: dict[tuple[int, int], int] = {}
        self.capabilities = dict.fromkeys(template.kvm_capabilities)
        for modifier in template.cpuid_modifiers:
            self.flags[modifier.leaf, modifier.subleaf] = modifier.flags
            for register, pattern in modifier.modifiers:
                self._add(Place(modifier.leaf, modifier.subleaf, register), pattern)
        for address, pattern in template.msr_modifiers:
            self._add(Place(address, 0, ""), pattern)

    def _add(self, place: Place, pattern: BitPattern) -> None:
        """A later modifier has the last word on the bits that it names."""
        before = self.patterns.get(place, BitPattern(0, 0))
        self.patterns[place] = BitPattern(before.filter | pattern.filter, pattern.apply(before.value))

    def template(self) -> CustomCpuTemplate:
        """Return the template, in the order in which the places came."""
        cpuid: dict[tuple[int, int], list[CpuidRegisterModifier]] = {}
        msrs = []
        for place, pattern in self.patterns.items():
            if place.register:
                changes = cpuid.setdefault((place.leaf, place.subleaf), [])
                changes.append(CpuidRegisterModifier(place.register, pattern))
            else:
                msrs.append(MsrModifier(place.leaf, pattern))
        modifiers = [
            CpuidModifier(leaf, subleaf, self.flags[leaf, subleaf], changes)
            for (leaf, subleaf), changes in cpuid.items()
        ]
        return CustomCpuTemplate(list(self.capabilities), modifiers, msrs)


def strip(templates: Sequence[CustomCpuTemplate]) -> list[CustomCpuTemplate]:
    """Return the templates without what all of them say: the bits that all set to the same value, and capabilities.

    Leaves and registers of which nothing is left go; so do modifiers without a bit.
    """
    sets = [Bits(template) for template in templates]
    places = {place for bits in sets for place in bits.patterns}
    for place in places:
        patterns = [bits.patterns.get(place, BitPattern(0, 0)) for bits in sets]
        common = _common_bits(patterns)
        for bits, pattern in zip(sets, patterns, strict=True):
            left = BitPattern(pattern.filter & ~common, pattern.value & ~common)
            if left.filter:
                bits.patterns[place] = left
            else:
                bits.patterns.pop(place, None)
    shared: set[KvmCapability] = set.intersection(*(set(bits.capabilities) for bits in sets)) if sets else set()
    for bits in sets:
        bits.capabilities = {each: None for each in bits.capabilities if each not in shared}
    return [bits.template() for bits in sets]


def _common_bits(patterns: Sequence[BitPattern]) -> int:
    """Return the bits that every pattern sets, to the same value."""
    common = patterns[0].filter
    for pattern in patterns[1:]:
        common &= pattern.filter & ~(pattern.value ^ patterns[0].value)
    return common


def differences(wanted: CustomCpuTemplate, found: CustomCpuTemplate) -> list[str]:
    """Return a line for each place where ``found`` does not have the bits that ``wanted`` sets."""
    have = Bits(found).patterns
    lines = []
    for place, pattern in Bits(wanted).patterns.items():
        actual = have.get(place)
        if actual is None:
            lines.append(f"{place}: the guest does not have it, the template says {pattern.text(place.bits)}")
            continue
        wrong = pattern.filter & ~(actual.filter & ~(actual.value ^ pattern.value))
        if wrong:
            lines.append(
                f"{place}: the guest has {actual.text(place.bits)}, the template says {pattern.text(place.bits)} "
                f"(bits {_bit_numbers(wrong)})"
            )
    return lines


def _bit_numbers(value: int) -> str:
    return ", ".join(str(number) for number in range(value.bit_length()) if value >> number & 1)


def bit_count(template: CustomCpuTemplate) -> int:
    """Return how many bits a template sets."""
    return sum(pattern.filter.bit_count() for pattern in Bits(template).patterns.values())
