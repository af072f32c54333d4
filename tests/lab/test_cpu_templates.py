"""Must-show 8: what a template says is what a Linux guest sees; and the round trip of cpu-template on kvm_amd."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.client import Microvm, without_log
from lab.guest_image import archive
from lab.tsc import host_tsc_khz
from tests.guests.build import build
from tests.harness.cpu_template import read, run
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, boot_args, jail
from vmm.cpu_config.template import BitPattern

MICROCODE = 0x0123_4567
#: What the template hides: feature → leaf, register, bit. Every processor with hardware paging has some of them.
HIDDEN = {
    "fma": ("0x1", "ecx", 12),
    "movbe": ("0x1", "ecx", 22),
    "f16c": ("0x1", "ecx", 29),
    "bmi1": ("0x7", "ebx", 3),
    "avx2": ("0x7", "ebx", 5),
    "bmi2": ("0x7", "ebx", 8),
    "adx": ("0x7", "ebx", 19),
    "sha_ni": ("0x7", "ebx", 29),
    "lahf_lm": ("0x80000001", "ecx", 0),
    "abm": ("0x80000001", "ecx", 5),
    "sse4a": ("0x80000001", "ecx", 6),
    "clzero": ("0x80000008", "ebx", 0),
}
STEPPING = 7
INDEXED = ("0x7",)
REGISTERS = ("eax", "ebx", "ecx", "edx")


def template() -> dict[str, Any]:
    masks: dict[tuple[str, str], int] = {}
    for leaf, register, bit in HIDDEN.values():
        masks[leaf, register] = masks.get((leaf, register), 0) | 1 << bit
    leaves: dict[str, list[dict[str, str]]] = {"0x1": [{"register": "eax", "bitmap": f"0b{STEPPING:04b}"}]}
    for (leaf, register), mask in masks.items():
        leaves.setdefault(leaf, []).append({"register": register, "bitmap": BitPattern(mask, 0).text(32)})
    return {
        "kvm_capabilities": ["!4095"],
        "cpuid_modifiers": [
            {"leaf": leaf, "subleaf": "0x0", "flags": int(leaf in INDEXED), "modifiers": modifiers}
            for leaf, modifiers in leaves.items()
        ],
        # The revision of the microcode: a number that the guest shows and nothing depends on.
        "msr_modifiers": [{"addr": "0x8b", "bitmap": f"0b{MICROCODE:032b}"}],
    }


def test_round_trip_on_this_kvm(tmp_path: Path):
    """What is left after strip is what the template changed, here for the leaves, too, that only hardware can hide."""
    wanted = tmp_path / "template.json"
    wanted.write_text(json.dumps(template()))
    plain, changed = tmp_path / "plain.json", tmp_path / "changed.json"
    run("template", "dump", "-o", plain)
    run("template", "dump", "-t", wanted, "-o", changed)
    run("template", "strip", "-p", plain, changed)
    stripped = read(tmp_path / "changed_stripped.json")
    named = {
        (leaf["leaf"], modifier["register"]) for leaf in template()["cpuid_modifiers"] for modifier in leaf["modifiers"]
    }
    found = {
        (leaf["leaf"], modifier["register"]) for leaf in stripped["cpuid_modifiers"] for modifier in leaf["modifiers"]
    }
    assert found <= named
    assert {("0x1", "ecx"), ("0x7", "ebx")} <= found, "the test needs a processor that has some of the features"
    assert [msr["addr"] for msr in stripped["msr_modifiers"]] == ["0x8b"]
    assert run("template", "verify", "-t", tmp_path / "changed_stripped.json").startswith("The guest gets all ")


def host_model() -> tuple[str, int, int, int]:
    """Return vendor, family, model and stepping of the processor that the lab (or this host) has."""
    text = Path("/proc/cpuinfo").read_text()
    words = [re.search(rf"^{key}\s+: (\S+)$", text, re.MULTILINE) for key in
             ("vendor_id", "cpu family", "model", "stepping")]  # fmt: skip
    vendor, *numbers = (word[1] if word else "0" for word in words)
    family, model, stepping = map(int, numbers)
    return vendor, family, model, stepping


def t2a_is_permitted() -> bool:
    """Tell whether this is a Milan. The lab is one with this: ./dev lab
    --cpu-model max,family=25,model=1,stepping=1 .venv/bin/python -m pytest tests/lab/test_cpu_templates.py
    """
    return host_model() == ("AuthenticAMD", 25, 1, 1)


def cpuid_seen(output: str) -> list[dict[tuple[str, str], int]]:
    """Return what the program printed on each CPU: (leaf, register) → value."""
    seen: list[dict[tuple[str, str], int]] = []
    for line in output.splitlines():
        if line.startswith("on cpu "):
            seen.append({})
        elif re.fullmatch(r"([0-9a-f]{8} ){5}[0-9a-f]{8}", line):
            leaf, _, *values = (int(word, 16) for word in line.split())
            seen[-1].update({(hex(leaf), name): value for name, value in zip(REGISTERS, values, strict=True)})
    return seen


VCPUS = 2
LEAVES = ("0x0", "0x1", "0x7", "0xd", "0x80000001", "0x80000008")


@contextmanager
def linux_guest(guest_image: Any) -> Iterator[Microvm]:
    """A jailed microVM with a worker per vCPU, to be started: it shows its CPUs on the console, and ends."""
    pairs = " ".join(f"{leaf.removeprefix('0x')} 0" for leaf in LEAVES)
    script = (
        "dmesg -n 1; "  # what the kernel says must not come in between
        f"for c in $(seq 0 {VCPUS - 1}); do echo on cpu $c; taskset $(printf %x $((1 << c))) /bin/cpuid {pairs}; done; "
        "grep -E '^(flags|stepping|microcode|vendor_id)' /proc/cpuinfo"
    )
    with jail("cpu-template") as made:
        initramfs = Path(guest_image.initramfs).read_bytes() + archive({"bin/cpuid": build_program()})
        (made.root / "initramfs").write_bytes(initramfs)
        kernel = made.add(guest_image.vmlinux, "vmlinux")
        with made.launch((*CGROUP_OPTIONS, "--cleanup")) as vm:
            vm.wait_for_api()
            vm.must("PUT", "/machine-config", {"vcpu_count": VCPUS, "mem_size_mib": 256, "vcpu_placement": "Split"})
            arguments = f"{boot_args(script)} tsc_early_khz={host_tsc_khz()}"
            source = {"kernel_image_path": kernel, "initrd_path": "/initramfs", "boot_args": arguments}
            vm.must("PUT", "/boot-source", source)
            yield vm


def shown_by(vm: Microvm) -> str:
    """Start it; return what it shows."""
    vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
    output = without_log(vm.expect("CELLBLOCK-DONE", BOOT_TIMEOUT)).replace("\r", "")
    assert vm.wait(60.0) == 0
    return output


def flags_of(output: str) -> list[set[str]]:
    """Return what /proc/cpuinfo lists for each CPU."""
    flags = [set(line.split()) for line in output.splitlines() if line.startswith("flags")]
    assert len(flags) == VCPUS, output
    return flags


def test_a_linux_guest_sees_what_the_template_says(guest_image):
    """/proc/cpuinfo, and the instruction itself on every CPU."""
    with linux_guest(guest_image) as vm:
        refuse_what_kvm_does_not_know(vm)
        vm.must("PUT", "/cpu-config", template())
        output = shown_by(vm)
    seen = cpuid_seen(output)
    assert len(seen) == VCPUS, output
    for values in seen:
        for name, (leaf, register, bit) in HIDDEN.items():
            assert not values[leaf, register] >> bit & 1, name
        assert values["0x1", "eax"] & 15 == STEPPING
    # The same on every CPU but for the APIC id.
    assert len({tuple(value for key, value in each.items() if key != ("0x1", "ebx")) for each in seen}) == 1
    assert [each["0x1", "ebx"] >> 24 for each in seen] == list(range(VCPUS))
    for each in flags_of(output):
        assert not each & set(HIDDEN)
        assert {"hypervisor", "sse2", "lm"} <= each
    assert re.findall(r"^stepping\s+: (\d+)$", output, re.MULTILINE) == [str(STEPPING)] * VCPUS
    assert re.findall(r"^microcode\s+: (\S+)$", output, re.MULTILINE) == [hex(MICROCODE)] * VCPUS


def test_a_linux_guest_under_t2a(guest_image, tmp_path):
    """Where the template is permitted the guest gets all of it, and shows no feature newer than T2's processors."""
    with linux_guest(guest_image) as vm:
        vm.must("PATCH", "/machine-config", {"cpu_template": "T2A"})
        if not t2a_is_permitted():
            reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
            assert reply.status == 400
            assert reply.body["fault_message"].startswith("Start microvm error: Failed to get CPU template: ")
            return
        output = shown_by(vm)
    config = tmp_path / "config.json"
    machine = {"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2A"}
    source = {"boot-source": {"kernel_image_path": "/nix"}, "drives": []}
    config.write_text(json.dumps(source | {"machine-config": machine}))
    assert run("template", "verify", "-c", config).startswith("The guest gets all ")
    # By the kernel's names of the bits that docs/cpu-templates.md lists.
    newer = {"rdseed", "adx", "clflushopt", "clwb", "sha_ni", "umip", "pku", "ospke", "vaes", "vpclmulqdq", "rdpid",
             "fsrm", "xsavec", "xsaves", "xgetbv1", "sse4a", "misalignsse", "3dnowprefetch", "mmxext", "fxsr_opt",
             "svm", "cr8_legacy", "clzero", "xsaveerptr", "wbnoinvd", "monitor"}  # fmt: skip
    for flags in flags_of(output):
        assert not flags & newer
        assert {"avx2", "bmi2", "smep", "topoext", "hypervisor"} <= flags
    for values in cpuid_seen(output):
        assert values["0x1", "eax"] == 0xA0_0F11
        assert (values["0x7", "eax"], values["0x7", "ecx"]) == (0, 0)
        assert (values["0xd", "eax"], values["0xd", "ecx"], values["0xd", "edx"]) == (7, 832, 0)


def refuse_what_kvm_does_not_know(vm: Microvm) -> None:
    """A start that fails leaves the controller configurable: the next template of the same client is taken."""
    unknown = {"leaf": "0x12345678", "subleaf": "0x0", "flags": 0, "modifiers": []}
    vm.must("PUT", "/cpu-config", {"cpuid_modifiers": [unknown]})
    reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
    assert reply.status == 400
    assert reply.body["fault_message"] == (
        "Start microvm error: System configuration error: Failed to create guest config: Template changes a CPUID "
        "entry not supported by KVM: Leaf: 12345678, Subleaf: 0"
    )
    assert vm.must("GET", "/")["state"] == "Not started"


def build_program() -> bytes:
    """Return the program that executes CPUID; Linux lets none be mapped below 64 KiB, and ours is linked at 4 MiB."""
    return build("cpuid", address=0x40_0000).read_bytes()
