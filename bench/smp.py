"""What processors cost each other: one worker per vCPU (split), one for both (grouped), QEMU microvm, in one run.

Runs in the lab (or on a host with hardware paging). All three boot the same ELF kernel with two vCPUs and 256 MiB and
run tests/guests/smpbench.c: IPI round trips to a running processor, TLB shootdowns, pipe ping-pong between sleeping
processes on different processors, forks. Ratios of medians of interleaved rounds; absolute rates of the lab mean
nothing. QEMU's guest has KVM's paravirtual IPIs and TLB flushes, which a guest in several VMs cannot have.

Split and grouped are measured twice: with every vCPU bound to a host CPU of its own (vcpu_affinity), as who cares for
latency does it, and left to the host's scheduler. Bound, a ghost shares the CPU of the vCPU that it serves and the host
wakes it there, beside the CPU on which the receiver wakes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.measure import table
from devtool.project import PYTHON, ROOT, say
from devtool.testing import has_hardware_paging
from lab.client import Jail, without_log
from lab.guest_image import GuestImage, archive, command_line, ensure
from lab.tsc import host_tsc_khz
from tests.guests.build import build_program

#: Split, as a share of grouped, for pipe ping-pong and forks.
AIM = 0.7
VCPUS = 2
MEM_SIZE_MIB = 256
TIMEOUT_S = 300.0
SPLIT, GROUPED, QEMU = "Cellblock, split", "Cellblock, grouped", "QEMU microvm"
BOUND = ", bound"
_RESULT = re.compile(r"SMPBENCH ipi=([\d.]+) shootdown=([\d.]+) pipe=([\d.]+) fork=([\d.]+)")


class Rates(NamedTuple):
    """Each per second."""

    ipi: float
    shootdown: float
    pipe: float
    fork: float


def boot_args(reboot: str, seconds: float) -> str:
    """Return the same command line for all but for the way to reboot that each machine has."""
    run = command_line(f"smpbench {seconds}", end="reboot")
    return f"console=ttyS0 reboot={reboot} panic=-1 quiet tsc_early_khz={host_tsc_khz()} {run}"


def _rates(console: str) -> Rates:
    found = _RESULT.search(console)
    if found is None:
        raise SystemExit(f"the guest did not report:\n{console[-2000:]}")
    return Rates(*(float(value) for value in found.groups()))


def _affinity() -> str:
    """Return the value of vcpu_affinity that gives each vCPU a host CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < VCPUS:
        raise SystemExit(f"bench smp needs {VCPUS} host CPUs; this process may use {len(cpus)}")
    return "/".join(map(str, cpus[:VCPUS]))


def cellblock(image: GuestImage, initramfs: bytes, placement: str, bound: bool, seconds: float) -> Rates:
    """Boot jailed."""
    jail = Jail(f"bench-smp-{placement.lower()}")
    machine = {"vcpu_count": VCPUS, "mem_size_mib": MEM_SIZE_MIB, "vcpu_placement": placement}
    if bound:
        machine["vcpu_affinity"] = _affinity()
    try:
        config = {
            "boot-source": {
                "kernel_image_path": jail.add(image.vmlinux, "kernel"),
                "initrd_path": jail.write(initramfs, "initramfs"),
                "boot_args": boot_args("k", seconds),
            },
            "drives": [],
            "machine-config": machine,
        }
        path = jail.write(json.dumps(config), "config.json")
        version = "2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "1"
        options = ("--cleanup", "--cgroup-version", version, "--wall-log", "/dev/null")
        with jail.launch(options, ("--config-file", path, "--no-api")) as vm:
            status = vm.wait(TIMEOUT_S)
            if status != 0:
                raise SystemExit(f"the microVM ended with {status}:\n{vm.tail()}")
            return _rates(without_log(vm.console))
    finally:
        jail.remove()


def qemu(image: GuestImage, initramfs: bytes, seconds: float) -> Rates:
    """Boot under QEMU's microvm machine with KVM."""
    with tempfile.NamedTemporaryFile() as initrd:
        initrd.write(initramfs)
        initrd.flush()
        # fmt: off
        command = [
            "qemu-system-x86_64", "-M", "microvm", "-enable-kvm", "-cpu", "host", "-m", str(MEM_SIZE_MIB),
            "-smp", str(VCPUS), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
            "-kernel", str(image.vmlinux), "-initrd", initrd.name, "-append", boot_args("t", seconds),
        ]
        # fmt: on
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    return _rates(done.stdout + done.stderr)


def _median(runs: list[Rates]) -> Rates:
    return Rates(*(statistics.median(values) for values in zip(*runs, strict=True)))


def _measure(rounds: int, seconds: float) -> int:
    image = ensure()
    program = build_program("smpbench").read_bytes()
    initramfs = image.initramfs.read_bytes() + archive({"bin/smpbench": program})
    cells = [(SPLIT, "Split"), (GROUPED, "Grouped")]
    runs: dict[str, list[Rates]] = {}
    for number in range(rounds):
        for bound in (True, False):
            for name, placement in cells:
                rates = cellblock(image, initramfs, placement, bound, seconds)
                runs.setdefault(name + BOUND * bound, []).append(rates)
        runs.setdefault(QEMU, []).append(qemu(image, initramfs, seconds))
        say(f"round {number + 1} of {rounds}: " + "; ".join(f"{name} {each[-1]}" for name, each in runs.items()))
    medians = {name: _median(each) for name, each in runs.items()}
    rows = [
        [name, f"{1e6 / each.ipi:.1f}", f"{each.shootdown:.0f}", f"{each.pipe:.0f}", f"{each.fork:.0f}"]
        for name, each in medians.items()
    ]
    table(["medians", "IPI round trip, µs", "shootdowns/s", "pipe round trips/s", "forks/s"], rows)
    for how in (BOUND, ""):
        for other in (GROUPED + how, QEMU):
            ratios = [a / b for a, b in zip(medians[SPLIT + how], medians[other], strict=True)]
            parts = ", ".join(f"{name} {ratio:.2f}" for name, ratio in zip(Rates._fields, ratios, strict=True))
            print(f"{SPLIT + how} / {other} (rates): {parts}")
    for how in (BOUND, ""):
        for name in ("pipe", "fork"):
            ratio = getattr(medians[SPLIT + how], name) / getattr(medians[GROUPED + how], name)
            verdict = "reached" if ratio >= AIM else "MISSED "
            print(f"{verdict}  {name}, split / grouped{how}: {ratio:.2f}, aim at least {AIM}")
    return 0


def main() -> int:
    """Measure here if Linux guests can run here, else inside the lab."""
    parser = argparse.ArgumentParser(prog="./dev bench smp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each thing is measured in a round")
    options = parser.parse_args()
    if os.environ.get("CELLBLOCK_LAB") == "1" or has_hardware_paging():
        return _measure(options.rounds, options.seconds)
    ensure()  # outside, where the cache is kept
    build_program("smpbench")
    lab = [str(PYTHON), "-m", "lab", "--timeout", "1500", "--memory", "3072", "--touched", "--"]
    command = [*lab, str(PYTHON), "-m", "bench.smp"]
    command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
