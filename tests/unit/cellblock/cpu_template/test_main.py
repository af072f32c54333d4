"""The program cpu-template without KVM: bits, files, fingerprints, its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellblock.cpu_template import capture, files, fingerprint
from cellblock.cpu_template.errors import DifferenceError, ToolError
from cellblock.cpu_template.main import main
from cellblock.cpu_template.patterns import Bits, Place, bit_count, differences, strip
from ipc.messages.records import CpuidEntry, MsrValue
from ipc.messages.worker import DumpedCpuConfig
from tests.harness.run_options import SOAK
from vmm.cpu_config.dump import to_template
from vmm.cpu_config.setup import changed_cpuid
from vmm.cpu_config.template import (
    BitPattern,
    CpuidModifier,
    CpuidRegisterModifier,
    CustomCpuTemplate,
    KvmCapability,
    MsrModifier,
)

# Few places and few bits, so that templates have something in common.
#: Full count: ./dev test --soak cputemplate.
COUNT = 2_000 if SOAK in ("all", "cputemplate") else 25
pytestmark = pytest.mark.soak("cputemplate")
NIBBLE = st.integers(0, 15)


@st.composite
def patterns(draw: Any) -> BitPattern:
    changed = draw(NIBBLE)
    return BitPattern(changed, draw(NIBBLE) & changed)


cpuid_modifiers = st.builds(
    CpuidModifier,
    st.sampled_from([1, 7]),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 1]),
    st.lists(st.builds(CpuidRegisterModifier, st.sampled_from(["eax", "edx"]), patterns()), max_size=3),
)
templates = st.builds(
    CustomCpuTemplate,
    st.lists(st.builds(KvmCapability, st.integers(0, 3), st.booleans()), max_size=3),
    st.lists(cpuid_modifiers, max_size=4),
    st.lists(st.builds(MsrModifier, st.sampled_from([0x10A, 0x48]), patterns()), max_size=3),
)


def bits_of(template: CustomCpuTemplate) -> dict[tuple[Place, int], int]:
    """Every bit that a template sets: (place, number) → value."""
    return {
        (place, number): pattern.value >> number & 1
        for place, pattern in Bits(template).patterns.items()
        for number in range(place.bits)
        if pattern.filter >> number & 1
    }


@settings(max_examples=COUNT)
@given(st.lists(templates, min_size=2, max_size=4))
def test_stripping_removes_what_all_say_and_nothing_else(originals):
    stripped = strip(originals)
    before = [bits_of(each) for each in originals]
    after = [bits_of(each) for each in stripped]
    common = {bit: value for bit, value in before[0].items() if all(other.get(bit) == value for other in before)}
    for old, new in zip(before, after, strict=True):
        assert new == {bit: value for bit, value in old.items() if bit not in common}
    shared = set.intersection(*(set(each.kvm_capabilities) for each in originals))
    for old_template, new_template in zip(originals, stripped, strict=True):
        assert set(new_template.kvm_capabilities) == set(old_template.kvm_capabilities) - shared
        for modifier in new_template.cpuid_modifiers:
            assert modifier.modifiers
            assert all(pattern.filter for _, pattern in modifier.modifiers)
        assert bit_count(new_template) == len(bits_of(new_template))
    assert strip(stripped) == stripped


@settings(max_examples=COUNT)
@given(templates)
def test_equal_templates_leave_nothing(template):
    for stripped in strip([template, template]):
        assert stripped == CustomCpuTemplate([], [], [])


@settings(max_examples=COUNT)
@given(templates, templates)
def test_differences_are_the_bits_that_are_not_there(wanted, found):
    want, have = bits_of(wanted), bits_of(found)
    wrong = {place for (place, number), value in want.items() if have.get((place, number)) != value}
    missing = set(Bits(wanted).patterns) - set(Bits(found).patterns)
    lines = differences(wanted, found)
    assert [line.partition(": ")[0] for line in lines] == [
        str(place) for place in Bits(wanted).patterns if place in wrong | missing
    ]


@settings(max_examples=COUNT)
@given(st.lists(cpuid_modifiers, max_size=4), st.lists(st.integers(0, (1 << 32) - 1), min_size=16, max_size=16))
def test_a_template_that_is_applied_verifies(modifiers, values):
    """Whatever the host has: what the template says is found in what comes of it."""
    host = [
        CpuidEntry(leaf, subleaf, 1, *values[4 * number : 4 * number + 4])
        for number, (leaf, subleaf) in enumerate([(1, 0), (1, 1), (7, 0), (7, 1)])
    ]
    applied = to_template(DumpedCpuConfig(0, changed_cpuid(host, modifiers), ()))
    assert differences(CustomCpuTemplate([], modifiers, []), applied) == []


def test_differences_name_place_and_bits():
    wanted = CustomCpuTemplate(
        [],
        [CpuidModifier(7, 0, 1, [CpuidRegisterModifier("ebx", BitPattern(0b111, 0b101))])],
        [MsrModifier(0x10A, BitPattern(1, 1))],
    )
    found = to_template(DumpedCpuConfig(0, (CpuidEntry(7, 0, 1, 0, 0b110, 0, 0),), ()))
    first, second = differences(wanted, found)
    assert first == (
        f"CPUID leaf 0x7, subleaf 0x0, ebx: the guest has 0b{0b110:032b}, the template says 0b{'x' * 29}101 (bits 0, 1)"
    )
    assert second == f"MSR 0x10a: the guest does not have it, the template says 0b{'x' * 63}1"


def test_a_dump_is_sorted_and_holds_configuration_only():
    dumped = DumpedCpuConfig(
        0,
        (
            CpuidEntry(0xB, 0, 1, 1, 1, 1, 1),
            CpuidEntry(0x1F, 1, 1, 1, 1, 1, 1),
            CpuidEntry(7, 0, 1, 1, 2, 3, 4),
            CpuidEntry(1, 0, 0, 5, 6, 7, 8),
        ),
        (MsrValue(0x10A, 1), MsrValue(0x10, 2), MsrValue(0x6E0, 3), MsrValue(0x4B56_4D01, 4), MsrValue(0x48, 5)),
    )
    template = to_template(dumped)
    assert [each.leaf for each in template.cpuid_modifiers] == [1, 7]
    assert [name for name, _ in template.cpuid_modifiers[1].modifiers] == ["eax", "ebx", "ecx", "edx"]
    assert template.msr_modifiers == [(0x48, ((1 << 64) - 1, 5)), (0x10A, ((1 << 64) - 1, 1))]


# -- files ------------------------------------------------------------------------------------------------------------

FULL = CustomCpuTemplate([KvmCapability(5, False)], [], [MsrModifier(0x10A, BitPattern(3, 1))])


@settings(max_examples=COUNT)
@given(templates)
def test_templates_are_read_as_they_were_written(tmp_path_factory, template):
    path = tmp_path_factory.mktemp("t") / "t.json"
    files.write_template(path, template)
    assert files.read_template(path) == template


@settings(max_examples=COUNT)
@given(st.binary(max_size=80))
def test_garbage_is_no_fingerprint_and_no_template(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "f.json"
    path.write_bytes(data)
    with pytest.raises(ToolError):
        fingerprint.read(path)
    try:
        files.read_template(path)
    except ToolError:
        pass


def finger(**changes: Any) -> fingerprint.Fingerprint:
    base = fingerprint.Fingerprint("1", "6.1", "0x1", None, "2", FULL)
    return base._replace(**changes)


def test_fingerprints_are_read_as_they_were_written(tmp_path):
    files.write_json(tmp_path / "f", finger().to_json())
    assert fingerprint.read(tmp_path / "f") == finger()


@pytest.mark.parametrize(
    "change",
    [
        {"bios_version": 5},
        {"kernel_version": ["x"]},
        {"guest_cpu_config": {"msr_modifiers": 1}},
        {"guest_cpu_config": None},
        {"more": "x"},
    ],
)
def test_fingerprints_that_are_refused(tmp_path, change):
    files.write_json(tmp_path / "f", finger().to_json() | change)
    with pytest.raises(ToolError):
        fingerprint.read(tmp_path / "f")
    with pytest.raises(ToolError):
        files.write_json(tmp_path / "nix" / "f", {})


def test_comparing_fingerprints():
    other = CustomCpuTemplate([KvmCapability(5, False)], [], [MsrModifier(0x10A, BitPattern(3, 2))])
    fingerprint.compare(finger(), finger())
    fingerprint.compare(finger(), finger(kernel_version="6.2"), ["bios-version", "microcode-version"])
    with pytest.raises(DifferenceError) as error:
        fingerprint.compare(finger(), finger(kernel_version="6.2", bios_version="x", guest_cpu_config=other))
    found = [json.loads(line) for line in error.value.lines]
    assert found[:2] == [
        {"name": "kernel_version", "prev": "6.1", "curr": "6.2"},
        {"name": "bios_version", "prev": None, "curr": "x"},
    ]
    # Of the guest's configuration only what differs is shown.
    assert found[2]["prev"]["msr_modifiers"] == [{"addr": "0x10a", "bitmap": BitPattern(3, 1).text(64)}]
    assert found[2]["prev"]["kvm_capabilities"] == []


def test_a_host_s_fingerprint():
    taken = fingerprint.take(FULL)
    assert taken.kernel_version == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert taken.microcode_version
    assert taken.guest_cpu_config == FULL


# -- command line -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main(["/x/cpu-template", *map(str, arguments)])


def test_strip_writes_beside_its_inputs(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b"]
    files.write_template(paths[0], FULL)
    files.write_template(paths[1], FULL._replace(msr_modifiers=[]))
    assert run("template", "strip", "-p", *paths) == 0
    assert files.read_template(tmp_path / "a_stripped.json") == FULL._replace(kvm_capabilities=[])
    assert files.read_template(tmp_path / "b_stripped") == CustomCpuTemplate([], [], [])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a_stripped.json: 2 bits differ",
        f"{tmp_path}/b_stripped: 0 bits differ",
    ]
    assert run("template", "strip", "--paths", *paths, "--suffix", "") == 0
    assert files.read_template(paths[1]) == CustomCpuTemplate([], [], [])


def test_compare_by_its_exit_status(tmp_path, capsys):
    files.write_json(tmp_path / "a", finger().to_json())
    files.write_json(tmp_path / "b", finger(bios_revision="3").to_json())
    command = ("fingerprint", "compare", "--prev", tmp_path / "a", "--curr")
    assert run(*command, tmp_path / "a") == 0
    assert run(*command, tmp_path / "b", "--filters", "bios-version", "kernel-version") == 0
    assert run(*command, tmp_path / "b") == 1
    assert '"name": "bios_revision"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("template strip -p {0}/t", "two or more templates can be stripped of what they have in common, not one"),
        ("template strip -p {0}/t {0}/nix",
         "The CPU template {0}/nix cannot be read: No such file or directory (os error 2)"),
        ("template strip -p {0}/t {0}", "The CPU template {0} cannot be read: Is a directory (os error 21)"),
        ("template strip -p {0}/t {0}/fifo", "The CPU template {0}/fifo cannot be read: not a regular file"),
        ("template strip -p {0}/t {0}/large",
         "The CPU template {0}/large cannot be read: the file is larger than 1048576 bytes"),
        ("template strip -p {0}/t {0}/bad", "{0}/bad is not a CPU template: unknown field `x`, expected one of "),
        ("template verify", "no CPU template: give one with --template, or a --config that has one"),
        ("template verify -c {0}/config", "no CPU template: give one with --template, or a --config that has one"),
        ("template dump -c {0}/bad", "Configuration for VMM from one single json failed: Invalid JSON: missing field "),
        ("template dump -t {0}/bad", "{0}/bad is not a CPU template: "),
        ("fingerprint dump -c {0}/nix", "The configuration file {0}/nix cannot be read: "),
        ("fingerprint compare -p {0}/t -c {0}/t", "{0}/t is not a fingerprint: its fields are to be "),
    ],
)  # fmt: skip
def test_errors_are_one_clear_line(tmp_path, capsys, arguments, text):
    files.write_template(tmp_path / "t", FULL)
    (tmp_path / "bad").write_text('{"x": 1}')
    (tmp_path / "large").write_bytes(b" " * (files.MAX_SIZE + 1))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "config").write_text('{"boot-source": {"kernel_image_path": "k"}, "drives": []}')
    assert run(*arguments.format(tmp_path).split()) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cpu-template: {text.format(tmp_path)}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    ["", "template", "fingerprint", "nonsense", "template strip", "template dump -x", "fingerprint compare -p a",
     "fingerprint compare -p a -c b -f nonsense"],
)  # fmt: skip
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments.split())
    assert end.value.code == 2


@pytest.mark.parametrize("arguments", ["--help", "template dump --help", "fingerprint compare -h", "--version"])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments.split())
    assert end.value.code == 0
    assert capsys.readouterr().out


def test_what_counts_of_a_configuration_file(tmp_path):
    """The machine and the template; devices and kernel are not needed, and need not exist."""
    config = {
        "boot-source": {"kernel_image_path": "/nix"},
        "drives": [{"drive_id": "r", "is_root_device": True, "path_on_host": "/nix"}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 256, "smt": True, "cpu_template": "T2"},
    }
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    target = capture.Target(path, None)
    document = target.document(tmp_path / "k")
    machine: dict[str, Any] = document["machine-config"]
    assert machine == {"vcpu_count": 2, "mem_size_mib": 256, "smt": True, "cpu_template": "T2",
                       "track_dirty_pages": False, "huge_pages": "None"}  # fmt: skip
    assert document["drives"] == []
    assert target.required_template().cpuid_modifiers
    # A custom template, and one on the command line still more, replaces a static one.
    path.write_text(json.dumps(config | {"cpu-config": FULL.to_json()}))
    assert capture.Target(path, None).required_template() == FULL
    assert capture.Target(path, None).document(tmp_path)["machine-config"]["cpu_template"] is None
    other = FULL._replace(kvm_capabilities=[])
    files.write_template(tmp_path / "t", other)
    assert capture.Target(path, tmp_path / "t").document(tmp_path)["cpu-config"] == other.to_json()


def test_without_the_program_firecracker(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(tmp_path / "cpu-template")])
    assert run("template", "dump", "-o", tmp_path / "o") == 1
    assert "firecracker is neither beside this one nor on PATH" in capsys.readouterr().err
    (tmp_path / "firecracker").write_text("#!/bin/sh\necho one\necho two >&2\nexit 7\n")
    (tmp_path / "firecracker").chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run("template", "dump", "-o", tmp_path / "o") == 1
    assert capsys.readouterr().err.endswith("firecracker ended with status 7\none\ntwo\n")
    assert not (tmp_path / "o").exists()
