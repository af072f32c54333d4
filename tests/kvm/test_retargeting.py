"""Must-show 9: interrupts of a device that is moved between processors while it fires: none lost, none twice."""

from __future__ import annotations

import pytest

from tests.harness.bare_metal import run_retargeting


@pytest.mark.soak("smp")
@pytest.mark.parametrize(
    ("vcpus", "placement"),
    [
        pytest.param(2, "Grouped", marks=pytest.mark.slow),
        (2, "Split"),
        pytest.param(3, "Split", marks=pytest.mark.slow),
        (4, "0,2/1,3"),
    ],
)
def test_interrupts_arrive_once_while_they_are_moved(tmp_path, scale, no_leftovers, vcpus, placement):
    rounds = scale(300, 20_000)
    with no_leftovers(tmp_path):
        moves = run_retargeting(tmp_path, vcpus, placement, rounds, scale(120.0, 3600.0))
    assert moves >= rounds // 4
