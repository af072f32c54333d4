"""InstanceStart → Debian's init → reset, next to QEMU microvm's whole run with the same kernel and initramfs.

Each boot runs in a lab of its own (or on a host with hardware paging). Both get one vCPU, 256 MiB, the same ELF kernel,
initramfs and command line; the guest reports its uptime when init starts and reboots at once. Cold start, unpacking of
the bzImage, and one run of each with two vCPUs are shown beside it. Ratios of medians of interleaved rounds; absolute
times of the lab mean nothing. docs/benchmarks.md says what each figure means.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from devtool.project import PYTHON, ROOT, say
from devtool.testing import has_hardware_paging
from lab.client import Jail, Microvm
from lab.guest_image import GuestImage, command_line, ensure

#: InstanceStart → reset, as a share of QEMU's whole run.
AIM = 0.4
MEM_SIZE_MIB = 256
TIMEOUT_S = 240.0
_UPTIME = re.compile(rb"CELLBLOCK-INIT uptime=([\d.]+)")
_UNPACK = re.compile(r"Kernel loading took: (.*)")


class Run(NamedTuple):
    """One boot. Seconds; ``start`` is what came before InstanceStart, ``uptime`` the guest's own clock at init.

    ``loading``: the steps of InstanceStart.
    """

    start: float
    to_init: float
    to_reset: float
    uptime: float
    loading: str = ""


def boot_args(reboot: str) -> str:
    """Return the same command line for both but for the way to reboot that each machine has."""
    return f"console=ttyS0 reboot={reboot} panic=-1 quiet {command_line('true', end='reboot')}"


def cellblock(image: GuestImage, kernel: Path, vcpu_count: int = 1) -> Run:
    """Boot jailed, driven by the API."""
    jail = Jail("bench-boot")
    try:
        source = {
            "kernel_image_path": jail.add(kernel, "kernel"),
            "initrd_path": jail.add(image.initramfs, "initramfs"),
            "boot_args": boot_args("k"),
        }
        version = "2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "1"
        begin = time.monotonic()
        options = ("--cleanup", "--cgroup-version", version, "--wall-log", "/dev/null")
        with jail.launch(options, ("--level", "Debug")) as vm:
            vm.wait_for_api()
            vm.must("PUT", "/machine-config", {"vcpu_count": vcpu_count, "mem_size_mib": MEM_SIZE_MIB})
            vm.must("PUT", "/boot-source", source)
            started = time.monotonic()
            vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
            vm.expect("CELLBLOCK-INIT", TIMEOUT_S)
            to_init = time.monotonic() - started
            status = vm.wait(TIMEOUT_S)
            to_reset = time.monotonic() - started
            if status != 0:
                raise SystemExit(f"the microVM ended with {status}:\n{vm.tail()}")
            return Run(started - begin, to_init, to_reset, _uptime(bytes(vm.console)), _loading(vm))
    finally:
        jail.remove()


def _loading(vm: Microvm) -> str:
    found = _UNPACK.search(vm.console.decode(errors="replace"))
    return found.group(1) if found else "not logged"


def _uptime(console: bytes) -> float:
    found = _UPTIME.search(console)
    if found is None:
        raise SystemExit(f"the guest's init did not report:\n{console.decode(errors='replace')[-2000:]}")
    return float(found.group(1))


def qemu(image: GuestImage, vcpu_count: int = 1) -> Run:
    """Boot under QEMU's microvm machine with KVM."""
    # fmt: off
    command = [
        "qemu-system-x86_64", "-M", "microvm", "-enable-kvm", "-cpu", "host", "-m", str(MEM_SIZE_MIB),
        "-smp", str(vcpu_count), "-nodefaults",
        "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio", "-kernel", str(image.vmlinux),
        "-initrd", str(image.initramfs), "-append", boot_args("t"),
    ]
    # fmt: on
    begin = time.monotonic()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        console = b""
        to_init = 0.0
        while part := os.read(process.stdout.fileno(), 65536):
            console += part
            if not to_init and b"CELLBLOCK-INIT" in console:
                to_init = time.monotonic() - begin
        process.wait(TIMEOUT_S)
    return Run(0.0, to_init, time.monotonic() - begin, _uptime(console))


def _median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(values) for values in zip(*(run[:4] for run in runs), strict=True)))


def _boot(case: str) -> Run:
    image = ensure()
    cases: dict[str, Callable[[], Run]] = {
        "vmlinux": lambda: cellblock(image, Path(image.vmlinux)),
        "bzImage": lambda: cellblock(image, Path(image.vmlinuz)),
        "vmlinux, 2 vCPUs": lambda: cellblock(image, Path(image.vmlinux), vcpu_count=2),
        "QEMU": lambda: qemu(image),
        "QEMU, 2 vCPUs": lambda: qemu(image, vcpu_count=2),
    }
    return cases[case]()


def _boot_in_lab(case: str) -> Run:
    """Boot in a lab of its own.

    QEMU's software CPU looks for translated code at the first write to each page in which a guest has run code: whoever
    is second in a lab pays for that when it fills its guest's memory, several times what it costs the first.
    """
    lab = [str(PYTHON), "-m", "lab", "--timeout", "600", "--memory", "3072", "--touched", "--"]
    command = [*lab, str(PYTHON), "-m", "bench.boot", "--case", case]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    return Run(*json.loads(done.stdout.splitlines()[-1]))


def _measure(rounds: int, boot: Callable[[str], Run]) -> int:
    ours: list[Run] = []
    theirs: list[Run] = []
    for number in range(rounds):
        ours.append(boot("vmlinux"))
        theirs.append(boot("QEMU"))
        say(
            f"round {number + 1} of {rounds}: "
            f"Cellblock {ours[-1].to_reset:.1f} s (uptime at init {ours[-1].uptime:.1f} s; "
            f"loading: {ours[-1].loading}), QEMU {theirs[-1].to_reset:.1f} s ({theirs[-1].uptime:.1f} s)"
        )
    packed, smp, smp_qemu = boot("bzImage"), boot("vmlinux, 2 vCPUs"), boot("QEMU, 2 vCPUs")
    a, b = _median(ours), _median(theirs)
    print(f"{'seconds, medians':44} {'to init':>8} {'to reset':>9} {'guest uptime at init':>21}")
    print(f"{'Cellblock, jailed, from InstanceStart, vmlinux':44} {a.to_init:8.2f} {a.to_reset:9.2f} {a.uptime:21.2f}")
    print(f"{'QEMU microvm, whole run, vmlinux':44} {b.to_init:8.2f} {b.to_reset:9.2f} {b.uptime:21.2f}")
    print(f"{'Cellblock / QEMU':44} {a.to_init / b.to_init:8.2f} {a.to_reset / b.to_reset:9.2f}")
    print(f"beside it: jailer start until InstanceStart {a.start:.2f} s")
    print(f"from the bzImage: to reset {packed.to_reset:.2f} s (one run); loading: {packed.loading}")
    print(
        f"two vCPUs: to reset {smp.to_reset:.2f} s (uptime at init {smp.uptime:.2f} s), "
        f"QEMU {smp_qemu.to_reset:.2f} s ({smp_qemu.uptime:.2f} s), "
        f"ratio {smp.to_reset / smp_qemu.to_reset:.2f} (one run)"
    )
    ratio = a.to_reset / b.to_reset
    print(f"{'reached' if ratio <= AIM else 'MISSED '}  InstanceStart → reset / QEMU's run: {ratio:.2f}, aim {AIM}")
    return 0


def main() -> int:
    """Measure here if Linux guests can run here, else inside labs."""
    parser = argparse.ArgumentParser(prog="./dev bench boot", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", help="one boot, here; prints a line of JSON")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(_boot(options.case)))
        return 0
    ensure()  # outside, where the cache is kept
    return _measure(options.rounds, _boot if has_hardware_paging() else _boot_in_lab)


if __name__ == "__main__":
    sys.exit(main())
