"""Hostile block requests: every form of the device does the same, and none raises."""

from __future__ import annotations

import json
import subprocess

import pytest

from devtool.project import PYTHON, ROOT

FULL = 1_000_000


@pytest.mark.soak("virtio")
def test_forms_of_the_block_device_are_alike(seed, scale):
    count = scale(4000, FULL)
    command = [str(PYTHON), "-m", "tests.fuzz.block_fuzz", str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes = json.loads(done.stdout)
    assert outcomes["chains"] >= count
    assert 0.1 < outcomes["refused"] / outcomes["examples"] < 0.9, "neither only sound rings nor only broken ones"
