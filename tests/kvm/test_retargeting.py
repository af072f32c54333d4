"""Must-show 9: interrupts of a device that is moved between processors while it fires: none lost, none twice."""

from __future__ import annotations

import re

import pytest

from lab.client import launch_unjailed, without_log
from tests.guests.build import build
from tests.harness.microvms import smp_config


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
    kernel = build("retarget", {"CPUS": vcpus, "ROUNDS": rounds, "MOVES": rounds // 4})
    config = smp_config(tmp_path, kernel, vcpus, placement)
    with no_leftovers(tmp_path), launch_unjailed(tmp_path, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(scale(120.0, 3600.0))
        config.unlink()
    found = re.search(r"(\.+)([0-9a-f]{8}) RETARGET DONE", without_log(vm.console))
    assert found, vm.tail()
    assert len(found.group(1)) >= rounds - 1
    moves = int(found.group(2), 16)
    print(f"{vcpus} vCPUs, {placement}: {len(found.group(1))} interrupts, the entry was written {moves} times")
    assert moves >= rounds // 4
    assert status == 0
