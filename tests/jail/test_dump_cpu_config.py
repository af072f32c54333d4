"""firecracker --dump-cpu-config in a jail: the configuration of a microVM that never ran, written by its user."""

from __future__ import annotations

import json
import secrets

from lab.client import Jail
from tests.guests.build import build
from tests.harness.run_options import NoLeftovers


def test_a_jailed_microvm_dumps_its_cpu_configuration(no_leftovers: NoLeftovers):
    name = f"dump-cpu-config-{secrets.token_hex(4)}"
    jail = Jail(name)
    try:
        machine = {"vcpu_count": 2, "mem_size_mib": 64, "smt": True}
        source = {"kernel_image_path": jail.add(build("spin"), "kernel")}
        config = jail.write(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}), "config.json")
        arguments = ("--config-file", config, "--no-api", "--dump-cpu-config", "/cpu.json")
        with no_leftovers(names=(name,)), jail.launch((), arguments) as vm:
            assert vm.wait(60.0) == 0, vm.tail()
            assert "spinning" not in vm.tail(1000), "no instruction was run"
        dumped = jail.root / "cpu.json"
        assert (dumped.stat().st_uid, dumped.stat().st_gid) == (jail.uid, jail.gid)
        leaves = {
            (leaf["leaf"], leaf["subleaf"]): leaf["modifiers"]
            for leaf in json.loads(dumped.read_text())["cpuid_modifiers"]
        }
        ebx = next(change["bitmap"] for change in leaves["0x1", "0x0"] if change["register"] == "ebx")
        assert int(ebx, 2) == 2 << 16 | 8 << 8, "vCPU 0 of two"
    finally:
        jail.remove()
