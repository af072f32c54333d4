"""Debian guests in a jail: their configuration, what is run in them, what they must not complain of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.client import Jail, Microvm, without_log
from lab.guest_image import archive, command_line
from lab.tsc import host_tsc_khz
from tests.guests.build import build_program
from tests.harness.run_options import IN_LAB, SOAK

BASE_ARGS = "console=ttyS0 reboot=k panic=1 quiet"
BOOT_TIMEOUT = 240.0
CGROUP_OPTIONS = ("--cgroup-version", "2") if Path("/sys/fs/cgroup/cgroup.controllers").exists() else ()


@contextmanager
def jail(name: str) -> Iterator[Jail]:
    """A jail root that is gone afterwards."""
    made = Jail(name)
    try:
        yield made
    finally:
        made.remove()


def boot_args(run: str = "", end: str = "reboot") -> str:
    return f"{BASE_ARGS} {command_line(run, end=end)}"


#: The lab's software CPU executes XSETBV in a nested guest without telling the hypervisor, whose CPUID then shows the
#: size of the registers enabled before; the kernel warns of that once, with a trace, while it starts. Under QEMU's
#: microvm with one vCPU it does the same. Nothing else is forgiven, and nowhere else.
_FORGIVEN = (
    "awk '/cut here/ { first = $0; getline; if (/XSAVE consistency problem/) skip = 1; else print first } "
    "skip { if (/end trace/) skip = 0; next } { print }' |"
    if IN_LAB
    else ""
)
COMPLAINTS = (
    f"dmesg | grep -v 'ommand line' | {_FORGIVEN} grep -Ei -A12 'clocksource.*unstable|TSC.*(warp|unstable)|lockup|"
    "detected.*stall|Call Trace|WARNING:|BUG:|Oops' && echo complaint || echo 'no complaint'"
)
#: A host on which others run beside us starves its guests, QEMU's too, for longer than their watchdogs bear; and what
#: these then do, an NMI to every CPU, is more than the lab's nested guests survive (docs/lab.md).
PATIENCE = " watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=300"


def config(
    made: Any,
    guest_image: Any,
    machine: dict[str, Any],
    run: str,
    end: str,
    *,
    programs: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    patient: bool = not SOAK,
    arguments: str = "",
    drives: Sequence[dict[str, Any]] = (),
) -> str:
    """Write a configuration file. The guest has ``programs`` of tests/guests in /bin, and ``files``; its kernel gets
    ``arguments``.

    Soaks run alone, and with the kernel's own limits unless they are to be ``patient``.

    What is to be run comes in an archive of its own: it is too long for a command line.
    """
    arguments = f"{boot_args('', end)} tsc_early_khz={host_tsc_khz()}{PATIENCE if patient else ''} {arguments}"
    added = {f"bin/{name}": build_program(name).read_bytes() for name in programs} | dict(files or {})
    if run:
        added["cellblock/script"] = run.encode()
    more = archive(added) if added else b""
    path: str = made.write(
        json.dumps(
            {
                "boot-source": {
                    "kernel_image_path": made.add(guest_image.vmlinux, "vmlinux"),
                    "initrd_path": made.write(guest_image.initramfs.read_bytes() + more, "initramfs"),
                    "boot_args": arguments,
                },
                "drives": list(drives),
                "machine-config": {"mem_size_mib": 256, **machine},
            }
        ),
        "config.json",
    )
    return path


#: More vCPUs than a lab on two CPUs boots in useful time beside everything else.
SOAK_ONLY = pytest.mark.soak("smp", only=True)


def run(vm: Microvm, command: str) -> str:
    """Run a command in the guest; return what the guest has said until its end."""
    vm.type(f"{command}\n")
    return without_log(vm.expect("CELLBLOCK-RUN end", 120.0))
