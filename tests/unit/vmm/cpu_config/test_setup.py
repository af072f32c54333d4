"""From a CPU template to a worker's configuration: on fake CPUIDs of every processor that static templates name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import CapabilityDemand, CpuidEntry, MsrChange
from vmm.config.machine import CPU_TEMPLATES, NO_CPU_TEMPLATE
from vmm.cpu_config.setup import CpuSetup, CpuTemplateError, changed_cpuid, cpu_setup
from vmm.cpu_config.static_templates import (
    CASCADE_LAKE,
    ICE_LAKE,
    MILAN,
    PERMITTED,
    SKYLAKE,
    StaticTemplateError,
    static_template,
)
from vmm.cpu_config.template import CPU_TEMPLATE, BitPattern, CpuidModifier, CpuidRegisterModifier
from vmm.json.schema import decode

ONES = 0xFFFF_FFFF
INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX ECX EDX of leaf 0
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)
EDITED = ((1, 0), (7, 0), (0xD, 0), (0xD, 1), (0x8000_0001, 0), (0x8000_0008, 0))


def host(vendor: tuple[int, int, int], signature: int) -> list[CpuidEntry]:
    """A processor that has every feature there is."""
    leaves = [CpuidEntry(leaf, subleaf, int(leaf in (7, 0xD)), ONES, ONES, ONES, ONES) for leaf, subleaf in EDITED]
    leaves[0] = leaves[0]._replace(eax=signature)
    return [CpuidEntry(0, 0, 0, 0x20, *vendor), *leaves, CpuidEntry(0x8000_0007, 0, 0, 1, 2, 3, 4)]


MODELS = {
    "Skylake": (INTEL, SKYLAKE),
    "Cascade Lake": (INTEL, CASCADE_LAKE),
    "Ice Lake": (INTEL, ICE_LAKE),
    "Sapphire Rapids": (INTEL, 0x0008_06F8),
    "Cooper Lake": (INTEL, 0x0005_065B),
    "Milan": (AMD, MILAN),
    "Genoa": (AMD, 0x00A1_0F11),
}
WHERE = {
    "C3": {"Skylake", "Cascade Lake", "Ice Lake"},
    "T2": {"Skylake", "Cascade Lake", "Ice Lake"},
    "T2S": {"Skylake", "Cascade Lake"},
    "T2CL": {"Cascade Lake", "Ice Lake"},
    "T2A": {"Milan"},
}


def template(document: Any) -> Any:
    return decode(CPU_TEMPLATE, json.dumps(document).encode())


def never() -> list[CpuidEntry]:
    raise AssertionError("the host's CPUID does not matter here")


def on_host(name: str, leaves: list[CpuidEntry]) -> CpuSetup:
    return cpu_setup(name, None, lambda: leaves)


def test_every_name_of_the_api_has_a_template():
    assert set(PERMITTED) == set(CPU_TEMPLATES) - {NO_CPU_TEMPLATE} == set(WHERE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WHERE)
def test_where_static_templates_are_permitted(name, model):
    vendor, signature = MODELS[model]
    if model in WHERE[name]:
        assert on_host(name, host(vendor, signature)).cpuid
        return
    with pytest.raises(StaticTemplateError) as error:
        on_host(name, host(vendor, signature))
    if (vendor == AMD) == (name == "T2A"):
        reason = "The current CPU model is not permitted to apply the CPU template."
    else:
        reason = "CPU vendor mismatched between actual CPU and CPU template."
    assert str(error.value) == f"Failed to get CPU template: {reason}"


def test_a_host_without_the_leaves_is_refused():
    for leaves in ([], host(AMD, MILAN)[:1]):
        with pytest.raises(StaticTemplateError):
            on_host("T2A", leaves)


@pytest.mark.parametrize("name", WHERE)
def test_guests_of_one_static_template_see_the_same_on_every_permitted_model(name):
    """The point of them: what differs among the models is gone, as far as the edited leaves go."""
    seen = set()
    for model in WHERE[name]:
        vendor, signature = MODELS[model]
        setup = on_host(name, host(vendor, signature))
        by_leaf = {(each.leaf, each.subleaf): each for each in setup.cpuid}
        seen.add((tuple(by_leaf[key] for key in EDITED), setup.msr_changes))
        assert by_leaf[0x8000_0007, 0] == CpuidEntry(0x8000_0007, 0, 0, 1, 2, 3, 4)
    assert len(seen) == 1


def registers(name: str, leaf: int, subleaf: int = 0) -> CpuidEntry:
    vendor, signature = MODELS[sorted(WHERE[name])[0]]
    setup = on_host(name, host(vendor, signature))
    return next(each for each in setup.cpuid if (each.leaf, each.subleaf) == (leaf, subleaf))


@pytest.mark.parametrize("name", WHERE)
def test_what_no_static_template_shows(name):
    """By specification: nothing of AVX-512, AMX, MPX, protection keys, TSX, SGX, virtualisation."""
    seven = registers(name, 7)
    assert seven.eax == 0
    for bit in (2, 4, 11, 14, 16, 17, 21, 26, 27, 28, 30, 31):
        assert not seven.ebx >> bit & 1
    assert seven.ecx == 0
    assert seven.edx & ~(1 << 10 | 0b111 << 26 | 1 << 29 | 1 << 31) == 0
    assert not registers(name, 1).ecx >> 5 & 1
    size = registers(name, 0xD)
    assert (size.eax, size.ecx, size.edx) == (0b111, 512 + 64 + 256, 0)
    assert registers(name, 0xD, 1)[3:] == (1, 0, 0, 0)


@pytest.mark.parametrize("name", WHERE)
def test_what_every_static_template_keeps(name):
    one, seven = registers(name, 1), registers(name, 7)
    for bit in (0, 1, 9, 13, 17, 19, 20, 21, 23, 25, 26, 28, 29, 30, 31):  # SSE3 … AVX, F16C, RDRAND, hypervisor
        assert one.ecx >> bit & 1
    assert seven.ebx >> 7 & 1  # SMEP
    assert seven.ebx >> 20 & 1  # SMAP
    assert all(seven.edx >> bit & 1 for bit in (10, 26, 27, 31))
    assert seven.ebx >> 5 & 1 == (name != "C3")  # AVX2


def test_arch_capabilities_are_fixed_where_guests_move_between_models():
    skylake, cascade = host(INTEL, SKYLAKE), host(INTEL, CASCADE_LAKE)
    all64 = (1 << 64) - 1
    assert on_host("T2S", skylake).msr_changes == (MsrChange(0x10A, all64, 0b100),)
    assert on_host("T2CL", cascade).msr_changes == (MsrChange(0x10A, all64, 0x8002B),)
    for name in ("T2", "C3"):
        assert on_host(name, skylake).msr_changes == ()
    assert registers("T2S", 7).edx >> 29 & 1


def test_no_template_asks_nobody():
    assert cpu_setup(None, None, never) == CpuSetup()
    only_msrs = template({"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}], "kvm_capabilities": ["5"]})
    assert cpu_setup(None, only_msrs, never) == CpuSetup(
        (), (MsrChange(0x10A, 1, 1),), (CapabilityDemand(5, required=True),)
    )


@given(st.sampled_from(EDITED), st.sampled_from(["eax", "ebx", "ecx", "edx"]), st.integers(0, ONES), st.data())
def test_only_the_named_bits_change(key, register, mask, data):
    value = data.draw(st.integers(0, ONES)) & mask
    before = host(AMD, MILAN)
    modifier = CpuidModifier(key[0], key[1], 1, [CpuidRegisterModifier(register, BitPattern(mask, value))])
    after = changed_cpuid(before, [modifier])
    assert [(each.leaf, each.subleaf) for each in after] == [(each.leaf, each.subleaf) for each in before]
    for old, new in zip(before, after, strict=True):
        if (old.leaf, old.subleaf) != key:
            assert new == old
            continue
        old_value, new_value = getattr(old, register), getattr(new, register)
        assert new == old._replace(flags=1, **{register: new_value})
        assert new_value & mask == value
        assert new_value & ~mask == old_value & ~mask


def test_an_unknown_leaf_is_refused_by_name():
    unknown = template({"cpuid_modifiers": [{"leaf": "0x1f", "subleaf": "0x1", "flags": 1, "modifiers": []}]})
    with pytest.raises(CpuTemplateError) as error:
        cpu_setup(None, unknown, lambda: host(AMD, MILAN))
    assert str(error.value) == (
        "System configuration error: Failed to create guest config: Template changes a CPUID entry not supported by "
        "KVM: Leaf: 1f, Subleaf: 1"
    )


def test_modifiers_of_one_register_add_up():
    msrs = [{"addr": "0x10", "bitmap": "0b1x0"}, {"addr": "0x11", "bitmap": "1"}, {"addr": "0x10", "bitmap": "0b00x"}]
    setup = cpu_setup(None, template({"msr_modifiers": msrs}), never)
    assert setup.msr_changes == (MsrChange(0x10, 0b111, 0b000), MsrChange(0x11, 1, 1))
    setup = cpu_setup(None, template({"kvm_capabilities": ["!5", "6", "5", "!6", "!7"]}), never)
    assert dict(setup.capabilities) == {5: True, 6: True, 7: False}


@pytest.mark.parametrize(
    ("count", "fits"),
    [(1024, True), (1025, False)],
)
def test_more_than_a_message_holds_is_refused(count, fits):
    msrs = [{"addr": hex(number), "bitmap": "1"} for number in range(count)]
    capabilities = [str(number) for number in range(count)]
    for document in ({"msr_modifiers": msrs}, {"kvm_capabilities": capabilities}):
        if fits:
            cpu_setup(None, template(document), never)
        else:
            with pytest.raises(CpuTemplateError, match="1025 "):
                cpu_setup(None, template(document), never)


@pytest.mark.parametrize("name", WHERE)
def test_a_static_template_can_be_written_as_a_custom_one(name):
    made = static_template(name)
    assert template(made.to_json()) == made
