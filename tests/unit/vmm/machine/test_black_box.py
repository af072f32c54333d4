"""The black box reads a page that a stranger wrote, and says what is in it in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.cells import RUN_PAGE_SIZE, run_page
from vmm.machine.black_box import EXIT_REASONS, describe_run_page


def describe(content: bytes) -> str:
    return describe_run_page(memoryview(content.ljust(RUN_PAGE_SIZE, b"\0")))


def test_registers_are_those_of_the_kernel_headers():
    text = describe(run_page(reason=8, rip=0x1234))
    assert text == (
        "last exit shutdown; rip=0x1234 rflags=0x111 rax=0x100 rbx=0x101 rcx=0x102 rdx=0x103 rsi=0x104 rdi=0x105 "
        "rsp=0x106 rbp=0x107 cr0=0x80050033 cr2=0xdead0000 cr3=0x1000 cr4=0x20."
    )


@pytest.mark.parametrize(("valid", "words"), [(0, "no registers"), (2, "no registers"), (1, "rip="), (7, "cr3=")])
def test_only_what_kvm_has_recorded_is_shown(valid, words):
    text = describe(run_page(valid=valid))
    assert words in text
    assert ("rip=" in text) is bool(valid & 1)
    assert ("cr3=" in text) is (valid & 3 == 3)


def test_reasons_have_names():
    assert {describe(run_page(reason=reason)).split(";")[0] for reason in EXIT_REASONS} == {
        f"last exit {name}" for name in EXIT_REASONS.values()
    }
    assert "last exit 4711" in describe(run_page(reason=4711))


@given(st.binary(max_size=RUN_PAGE_SIZE))
def test_any_content_gives_one_line(content):
    text = describe(content)
    assert text.isprintable()
    assert len(text) < 1000
