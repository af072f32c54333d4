"""Custom CPU templates: bit patterns, numbers, and that what is shown means the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cpu_config.template import CPU_TEMPLATE, BitPattern, CpuidModifier, KvmCapability, MsrModifier
from vmm.json.decoder import JsonError
from vmm.json.schema import decode

U32 = st.integers(0, (1 << 32) - 1)


def parse(document: Any) -> Any:
    return decode(CPU_TEMPLATE, json.dumps(document).encode())


def bitmap(text: str) -> BitPattern:
    pattern: BitPattern = parse({"msr_modifiers": [{"addr": "0x0", "bitmap": text}]}).msr_modifiers[0].bitmap
    return pattern


@st.composite
def patterns(draw: Any, bits: int) -> BitPattern:
    changed = draw(st.integers(0, (1 << bits) - 1))
    return BitPattern(changed, draw(st.integers(0, (1 << bits) - 1)) & changed)


@pytest.mark.parametrize(
    ("text", "changed", "value"),
    [
        ("0b1", 1, 1),
        ("0bx", 0, 0),
        ("", 0, 0),
        ("10x", 0b110, 0b100),
        ("0b0_1x_", 0b110, 0b010),
        ("0b" + "1" * 64, (1 << 64) - 1, (1 << 64) - 1),
        ("0b" + "0x" * 32, 0xAAAA_AAAA_AAAA_AAAA, 0),
    ],
)
def test_bit_patterns(text, changed, value):
    assert bitmap(text) == BitPattern(changed, value)


@given(patterns(64), st.integers(0, (1 << 64) - 1))
def test_a_pattern_changes_its_bits_and_no_other(pattern, value):
    after = pattern.apply(value)
    assert after & pattern.filter == pattern.value
    assert after & ~pattern.filter == value & ~pattern.filter
    assert bitmap(pattern.text(64)) == pattern


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0b2", "unknown character: 50"),
        ("0b-", "unknown character: 45"),
        ("0b1Ͻ", "unknown character: 189"),
        ("0x1", None),  # x is a bit that stays
        ("0b" + "1" * 65, "string is too long"),
    ],
)
def test_patterns_that_are_refused(text, reason):
    if reason is None:
        assert bitmap(text) == BitPattern(0b101, 0b001)
        return
    with pytest.raises(JsonError) as error:
        bitmap(text)
    assert error.value.reason == f"Failed to parse string [{text}] as a bitmap - {reason}"


def test_cpuid_patterns_have_32_bits():
    def modifier(text: str) -> Any:
        register = {"register": "eax", "bitmap": text}
        return parse({"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0b10", "flags": 1, "modifiers": [register]}]})

    assert modifier("1" * 32).cpuid_modifiers == [
        CpuidModifier(1, 2, 1, [("eax", ((1 << 32) - 1, (1 << 32) - 1))])  # type: ignore[list-item]
    ]
    with pytest.raises(JsonError, match="string is too long"):
        modifier("1" * 33)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0x", "Failed to parse string [0x] as a number for CPU template - ParseIntError { kind: Empty }"),
        ("0b2", "Failed to parse string [0b2] as a number for CPU template - ParseIntError { kind: InvalidDigit }"),
        ("0x100000000",
         "Failed to parse string [0x100000000] as a number for CPU template - ParseIntError { kind: PosOverflow }"),
        ("16", ("No supported number system prefix found in value [16]. Make sure to prefix the number with '0x' for "
         "hexadecimal numbers or '0b' for binary numbers.")),
    ],
)  # fmt: skip
def test_numbers_that_are_refused(text, reason):
    with pytest.raises(JsonError) as error:
        parse({"msr_modifiers": [{"addr": text, "bitmap": "0b1"}]})
    assert error.value.reason == reason


@given(U32, st.booleans())
def test_capabilities(number, required):
    text = f"{'' if required else '!'}{number}"
    assert parse({"kvm_capabilities": [text]}).kvm_capabilities == [KvmCapability(number, required)]


@given(
    st.lists(st.builds(KvmCapability, U32, st.booleans()), max_size=3),
    st.lists(
        st.builds(
            CpuidModifier,
            U32,
            U32,
            U32,
            st.lists(st.tuples(st.sampled_from(["eax", "ebx", "ecx", "edx"]), patterns(32)), max_size=3),
        ),
        max_size=3,
    ),
    st.lists(st.builds(MsrModifier, U32, patterns(64)), max_size=3),
)
def test_what_is_shown_means_the_same(capabilities, cpuid, msrs):
    document = {
        "kvm_capabilities": [f"{'' if item.required else '!'}{item.number}" for item in capabilities],
        "cpuid_modifiers": [
            {"leaf": hex(item.leaf), "subleaf": bin(item.subleaf), "flags": item.flags,
             "modifiers": [{"register": name, "bitmap": pattern.text(32)} for name, pattern in item.modifiers]}
            for item in cpuid
        ],
        "msr_modifiers": [{"addr": hex(item.addr), "bitmap": item.bitmap.text(64)} for item in msrs],
    }  # fmt: skip
    template = parse(document)
    assert (template.kvm_capabilities, template.cpuid_modifiers, template.msr_modifiers) == (capabilities, cpuid, msrs)
    assert parse(template.to_json()) == template


@given(st.binary(max_size=60))
def test_no_document_raises_anything_else(data):
    try:
        decode(CPU_TEMPLATE, data)
    except JsonError:
        pass
