"""The placement policy: what is read, what is refused, who runs what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.launch_plan import PLACEMENT_GROUPED, PLACEMENT_SPLIT, Assignment, LaunchPlan
from vmm.placement import GROUPED, MIXED, SPLIT, Placement, PlacementError, check, decide, warning


def plan(placement: str) -> LaunchPlan:
    values: dict[str, Any] = dict.fromkeys(LaunchPlan._fields, 0)
    return LaunchPlan(**values | {"placement": placement, "placement_reason": "because"})


HARDWARE, SHADOW = plan(PLACEMENT_SPLIT), plan(PLACEMENT_GROUPED)


@pytest.mark.parametrize(
    ("text", "host", "kind", "groups"),
    [
        (None, HARDWARE, SPLIT, ((0,), (1,), (2,), (3,))),
        (None, SHADOW, GROUPED, ((0, 1, 2, 3),)),
        ("Automatic", SHADOW, GROUPED, ((0, 1, 2, 3),)),
        ("Split", SHADOW, SPLIT, ((0,), (1,), (2,), (3,))),
        ("Grouped", HARDWARE, GROUPED, ((0, 1, 2, 3),)),
        ("0,1/2,3", HARDWARE, MIXED, ((0, 1), (2, 3))),
        ("3/2,0/1", HARDWARE, MIXED, ((0, 2), (1,), (3,))),
        ("3,2,1,0", HARDWARE, GROUPED, ((0, 1, 2, 3),)),
        ("0/1/2/3", HARDWARE, SPLIT, ((0,), (1,), (2,), (3,))),
    ],
)
def test_placements(text, host, kind, groups):
    placement = decide(text, 4, host)
    assert (placement.kind, placement.groups) == (kind, groups)
    for worker, group in enumerate(groups):
        assert [placement.owner(vcpu) for vcpu in group] == [worker] * len(group)
        assignment = placement.assignment(worker)
        assert assignment.worker == worker
        assert assignment.vcpus == group
        assert sorted(assignment.vcpus + assignment.ghosts) == [0, 1, 2, 3]
    assert bool(warning(placement, host)) == (host is SHADOW and len(groups) > 1)


def test_one_vcpu_needs_no_ghost_whatever_the_placement():
    for text in (None, "Split", "Grouped", "0"):
        for host in (HARDWARE, SHADOW):
            assert decide(text, 1, host).assignment(0) == Assignment(0, (0,), ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "split",
        "0,1",
        "0,1,2,3,4",
        "0,1/2,3/",
        "0/0,1,2,3",
        "0 1/2,3",
        "-0/1/2/3",
        "0,1/2,٣",
        "0,1/2,003",
        "0" * 200,
    ],
)
def test_what_is_no_placement_of_four(text):
    with pytest.raises(PlacementError):
        check(text, 4)


@given(st.text(), st.integers(1, 32))
def test_any_text_is_a_placement_or_an_error(text, count):
    try:
        placement = decide(text, count, HARDWARE)
    except PlacementError:
        return
    assert isinstance(placement, Placement)
    assert sorted(vcpu for group in placement.groups for vcpu in group) == list(range(count))
    assert placement.owner(0) == 0
