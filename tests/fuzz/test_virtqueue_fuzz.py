"""Hostile virtqueues: every chain is one that a device may use, or a QueueError; work is bounded."""

from __future__ import annotations

import json
import subprocess

import pytest

from devtool.project import PYTHON, ROOT
from tests.fuzz.virtqueue_fuzz import TARGETS

FULL = 1_000_000


@pytest.mark.soak("virtio")
@pytest.mark.parametrize("target", TARGETS)
def test_hostile_rings(target, seed, scale):
    count = scale(10_000, FULL)
    command = [str(PYTHON), "-m", "tests.fuzz.virtqueue_fuzz", target, str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{target}, seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes = json.loads(done.stdout)
    assert outcomes["chains"] >= count
    assert 0.02 < outcomes["refused"] / outcomes["chains"] < 0.9, "neither only sound rings nor only broken ones"
