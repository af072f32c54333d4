"""Every kind of interprocessor interrupt between vCPUs of one worker and of several; none lost, none twice.

The guest has no page tables: so its vCPUs may be in several workers also where there is no second-stage paging.
"""

from __future__ import annotations

import json

import pytest

from lab.client import launch_unjailed
from tests.guests.build import build


@pytest.mark.parametrize(
    ("vcpus", "placement"), [(2, "Grouped"), (4, "Grouped"), (2, "Split"), (3, "Split"), (4, "0,1/2,3"), (3, "0,2/1")]
)
def test_every_kind_of_ipi_arrives_once(tmp_path, scale, no_leftovers, vcpus, placement):
    rounds = scale(200, 10_000)
    # A renewed INIT is trapped by single-stepping where the host has second-stage paging, by breakpoints else.
    kernel = build("ipi", {"CPUS": vcpus, "ROUNDS": rounds, "NMIS": 1, "RESTARTS": scale(3, 100)})
    config = tmp_path / "config.json"
    machine = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
    config.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(kernel)}, "drives": [], "machine-config": machine})
    )
    with no_leftovers(tmp_path), launch_unjailed(tmp_path, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(300.0)
        output = vm.console.decode(errors="replace")
        config.unlink()
    assert "SFLCOAXNPR IPI DONE" in output, output[-3000:]
    assert status == 0
