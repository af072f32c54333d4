"""cellblock cpu-template on this host's KVM: dump → strip → verify, with the launchers, as an operator does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from base.version import FIRECRACKER_VERSION
from devtool.project import LAUNCHERS
from lab.client import launch_unjailed
from tests.guests.build import build
from tests.harness.cpu_template import NAMES, read, run
from tests.harness.run_options import NoLeftovers

#: Changes that every KVM takes over: see tests/kvm/test_worker_cpu.py.
TEMPLATE = {
    "kvm_capabilities": ["!4095"],
    "cpuid_modifiers": [
        {
            "leaf": "0x80000001",
            "subleaf": "0x0",
            "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0b0_00x0_xxxx"}],
        }
    ],
    "msr_modifiers": [{"addr": "0x277", "bitmap": "0b0000_0101_xxxx_xxxx"}],
}


def test_round_trip(tmp_path: Path, no_leftovers: NoLeftovers):
    template = tmp_path / "template.json"
    template.write_text(json.dumps(TEMPLATE))
    plain, changed = tmp_path / "plain.json", tmp_path / "changed.json"
    with no_leftovers():
        run("template", "dump", "-o", plain)
        run("template", "dump", "--template", template, "--output", changed)
        run("template", "strip", "-p", plain, changed)
        # What is left is what the template changed, bit for bit; strip made a template of it that verifies again.
        stripped = read(tmp_path / "changed_stripped.json")
        assert [item["leaf"] for item in stripped["cpuid_modifiers"]] == ["0x80000001"]
        (register,) = stripped["cpuid_modifiers"][0]["modifiers"]
        assert register["register"] == "ecx"
        assert set(register["bitmap"][2:]) == {"x", "0"}
        assert [item["addr"] for item in stripped["msr_modifiers"]] == ["0x277"]
        assert run("template", "verify", "-t", tmp_path / "changed_stripped.json").startswith("The guest gets all ")
    # The whole of a dump can be applied, too.
    run("template", "verify", "-t", changed)


def test_what_the_guest_does_not_get_is_said(tmp_path: Path):
    """The vendor is the host's whatever a template says."""
    template = tmp_path / "template.json"
    leaf = {"leaf": "0x0", "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ebx", "bitmap": "0" * 32}]}
    template.write_text(json.dumps({"cpuid_modifiers": [leaf]}))
    output = run("template", "verify", "-t", template, status=1)
    assert (
        "The guest does not get what the template says:\nCPUID leaf 0x0, subleaf 0x0, ebx: the guest has 0b" in output
    )


@pytest.mark.parametrize("program", NAMES)
def test_what_the_host_does_not_have_fails(program: str, tmp_path: Path):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"msr_modifiers": [{"addr": "0x12345678", "bitmap": "0b1"}]}))
    output = run("template", "dump", "-t", template, "-o", tmp_path / "o", program=program, status=1)
    assert output == (
        f"{program}: the microVM cannot be built: System configuration error: Failed to create guest config: "
        "Template changes an MSR entry not supported by KVM: Register Address: 12345678\n"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("program", NAMES)
def test_every_name_is_the_same_program(program: str):
    assert run("--version", program=program) == f"{program} v{FIRECRACKER_VERSION}\n"
    assert run("--help", program=program).startswith(f"usage: {program} [-h] [--version] template|fingerprint ...\n")
    assert run("template", "dump", "--no-such-flag", program=program, status=2).startswith(f"usage: {program} ")


def test_fingerprints(tmp_path: Path):
    """Under the name that clients of Firecracker know; the first file by its default name."""
    command = [str(LAUNCHERS / "cpu-template-helper"), "fingerprint", "dump"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    first = tmp_path / "fingerprint.json"
    taken = read(first)
    assert taken["guest_cpu_config"]["cpuid_modifiers"]
    run("fingerprint", "compare", "-p", first, "-c", first, program="cpu-template-helper")
    (tmp_path / "second").write_text(json.dumps(taken | {"kernel_version": "0"}))
    output = run("fingerprint", "compare", "-p", first, "-c", tmp_path / "second", status=1)
    assert '"name": "kernel_version"' in output


def test_a_config_file(tmp_path: Path):
    config = tmp_path / "config.json"
    machine = {"vcpu_count": 2, "mem_size_mib": 64}
    document = {"boot-source": {"kernel_image_path": "/nix"}, "drives": [], "machine-config": machine}
    config.write_text(json.dumps(document | {"cpu-config": TEMPLATE}))
    assert run("template", "verify", "-c", config).startswith("The guest gets all ")


def test_a_template_that_does_not_fit_leaves_the_microvm_configurable(tmp_path: Path):
    vendor = re.search(r"^vendor_id\s+: (\S+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert vendor
    other = "T2" if vendor[1] == "AuthenticAMD" else "T2A"
    with launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})

        def refused() -> str:
            reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
            assert reply.status == 400
            assert vm.must("GET", "/")["state"] == "Not started"
            text: str = reply.body["fault_message"]
            return text.removeprefix("Start microvm error: ")

        vm.must("PATCH", "/machine-config", {"cpu_template": other})
        assert refused() == ("Failed to get CPU template: CPU vendor mismatched between actual CPU and CPU template.")
        # The last one set counts: the static template is gone.
        leaf = {"leaf": "0xffffffff", "subleaf": "0x1", "flags": 1, "modifiers": []}
        vm.must("PUT", "/cpu-config", {"cpuid_modifiers": [leaf]})
        assert "cpu_template" not in vm.must("GET", "/machine-config")
        assert refused() == (
            "System configuration error: Failed to create guest config: Template changes a CPUID entry not supported "
            "by KVM: Leaf: ffffffff, Subleaf: 1"
        )
        vm.must("PUT", "/cpu-config", {"kvm_capabilities": ["4095"]})
        assert refused() == "Kvm error: Missing KVM capabilities: 0xfff"
        vm.must("PUT", "/cpu-config", TEMPLATE)
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        vm.expect("spinning")
