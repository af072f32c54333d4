"""Must-show 9: interrupts of a device that is moved between processors while it fires: none lost, none twice."""

from __future__ import annotations

import json
import re

import pytest

from lab.client import launch_unjailed
from tests.guests.build import build


@pytest.mark.soak("smp")
@pytest.mark.parametrize(("vcpus", "placement"), [(2, "Grouped"), (2, "Split"), (3, "Split"), (4, "0,2/1,3")])
def test_interrupts_arrive_once_while_they_are_moved(tmp_path, scale, no_leftovers, vcpus, placement):
    rounds = scale(300, 20_000)
    kernel = build("retarget", {"CPUS": vcpus, "ROUNDS": rounds})
    config = tmp_path / "config.json"
    machine = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
    config.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(kernel)}, "drives": [], "machine-config": machine})
    )
    with no_leftovers(tmp_path), launch_unjailed(tmp_path, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(scale(120.0, 3600.0))
        output = vm.console.decode(errors="replace")
        config.unlink()
    # The log goes to the same place, also between two letters of the guest.
    said = re.sub(r"\d{4}-\d\d-\d\dT[^\n]*\n|\{\"[^\n]*\n", "", output)
    found = re.search(r"(\.+)([0-9a-f]{8}) RETARGET DONE", said)
    assert found, output[-3000:]
    assert len(found.group(1)) == rounds
    moves = int(found.group(2), 16)
    print(f"{vcpus} vCPUs, {placement}: {rounds} interrupts, the entry was written {moves} times")
    assert moves >= rounds // 10
    assert status == 0
