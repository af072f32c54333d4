"""Whole devices against hostile drivers: a need for a reset at most, and no chain, stop or file is lost."""

from __future__ import annotations

import pytest

from tests.fuzz.virtio_device_fuzz import TARGETS
from tests.harness import fuzzing

FULL = 1_000_000


@pytest.mark.soak("virtio")
@pytest.mark.parametrize("target", TARGETS)
def test_hostile_drivers(target, seed, scale):
    count = scale(3000, FULL)
    outcomes = fuzzing.run("virtio_device_fuzz", target, seed, count, counted="chains")
    assert 0.2 < outcomes["refused"] / outcomes["examples"] < 0.9, "neither only sound drivers nor only broken ones"
