"""MSRs that a vCPU boots with: the template's changes of what KVM gave, then what every kernel expects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import MsrChange, MsrValue
from vcpu_worker.cpu.msr import BOOT_MSRS, IA32_MISC_ENABLE, IA32_TSC_DEADLINE, boot_msrs, state_indices
from vcpu_worker.errors import TemplateError

U64 = st.integers(0, (1 << 64) - 1)
BOOT = dict(BOOT_MSRS)


@given(U64, U64, U64)
def test_a_change_keeps_the_other_bits(base, mask, value):
    (after,) = [
        each.value
        for each in boot_msrs([MsrValue(0x10A, base)], [MsrChange(0x10A, mask, value)])
        if each.register == 0x10A
    ]
    assert after & mask == value & mask
    assert after & ~mask == base & ~mask


def test_boot_values_have_the_last_word():
    base = [MsrValue(0x10A, 0b1100), MsrValue(IA32_MISC_ENABLE, 0)]
    changes = [MsrChange(0x10A, 0b0101, 0b0001), MsrChange(IA32_MISC_ENABLE, ~0 & (1 << 64) - 1, 0x1800)]
    values = dict(boot_msrs(base, changes))
    assert values == {0x10A: 0b1001, **BOOT}
    assert dict(boot_msrs([], [])) == BOOT


def test_a_register_that_cannot_be_read_is_refused_by_name():
    with pytest.raises(TemplateError, match=r"MSR entry not supported by KVM: Register Address: c0010299$"):
        boot_msrs([MsrValue(0x10A, 0)], [MsrChange(0x10A, 1, 1), MsrChange(0xC001_0299, 1, 1)])


def test_what_a_template_adds_to_the_state_comes_before_the_timer():
    indices = state_indices((*state_indices([0x10, IA32_TSC_DEADLINE]), 0xC001_1029, 0x10))
    assert indices[-1] == IA32_TSC_DEADLINE
    assert indices.count(0x10) == indices.count(0xC001_1029) == 1
