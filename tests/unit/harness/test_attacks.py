"""The attack table: complete, with a reason for whatever is open, and shown as it is in docs/attack-table.md."""

from __future__ import annotations

import pytest

from ipc import drills
from tests.attack_table import OPEN, REASONS, ROWS
from tests.harness.attacks import CELLS, PAGE, meets, outcomes, page, row

#: So many attempts are refused in every kind of cell at least.
AT_LEAST = 60


def test_every_attempt_has_a_row() -> None:
    assert list(ROWS) == list(drills.ATTEMPTS)


def test_whatever_is_open_has_a_reason() -> None:
    is_open = {(cell, name) for name in ROWS for cell in CELLS if row(name, cell).guarded == OPEN}
    assert is_open == set(REASONS)


def test_what_is_open_in_a_worker_is_what_its_second_filter_forbids() -> None:
    """Each is among the calls that tests/unit/jailer/test_seccomp_forbids.py says must not be possible when it runs."""
    setup = {
        "peer-credentials", "kvm-create-vcpu", "kvm-enable-capability", "seccomp-filter", "dup2-over-channel",
    }  # fmt: skip
    assert {name for cell, name in REASONS if cell == "vcpu"} == setup


@pytest.mark.parametrize("cell", CELLS)
def test_enough_is_tried(cell: str) -> None:
    assert sum(row(name, cell).guarded != OPEN for name in ROWS) >= AT_LEAST


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(), "python -m tests.harness.attacks --write"


def test_outcomes_are_read_from_what_cells_print() -> None:
    text = "x: drill a: refused: Page has error (133)\ndrill b=1: refused: No (1)\ndrill c: succeeded (d)\n"
    assert outcomes(text) == {"a": "filter", "b=1": "EPERM", "c": "open"}


def test_an_outcome_is_one_of_those_that_are_allowed() -> None:
    assert meets("EPERM", "EPERM,ENOSYS")
    assert not meets("open", "EPERM,ENOSYS")
