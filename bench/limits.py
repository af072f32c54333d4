"""`./dev bench limits`: what a microVM of N vCPUs needs: memory, processes and threads, descriptors.

The least `pids.max` and `no-file` with which it starts are found by trying; memory is the peak of its control group
while a guest that does nothing runs. docs/jailer.md says what to give it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.control_group import MIB, ControlGroup
from bench.measure import BenchError, CpuAccount, Started, start, table
from bench.startup import FIRST_BYTE
from devtool.project import LAUNCHERS
from lab.client import Jail
from tests.guests.build import build

MEMORY_MIB = 128
UID = 10000
SETTLE_SECONDS = 0.2
#: More than any microVM needs.
ENOUGH = {"pids.max": 4000, "no-file": 4000}

#: What a start is refused with that met one of them.
REASONS = ("os error 11", "os error 24", "Too many open files")

Value = TypeVar("Value")


class Needs(NamedTuple):
    """What one microVM took. ``shared`` is guest memory, and a little that the cells share."""

    peak: int
    shared: int
    kernel: int
    tasks: int


class Microvms:
    """Starts jailed microVMs below ``folder``, one at a time, with guests that write a word and then do nothing."""

    def __init__(self, folder: Path, account: CpuAccount) -> None:
        self._folder = folder
        self._account = account
        self._number = 0

    def measure(self, vcpus: int, placement: str) -> Needs:
        """Run one without limits that matter."""

        def look(group: ControlGroup, _: Started) -> Needs:
            return Needs(group.peak(), group.part("shmem"), group.kernel(), group.tasks())

        return self._run(vcpus, placement, ENOUGH, look)

    def least(self, limit: str, vcpus: int, placement: str) -> int:
        """Return the least value of a limit with which a microVM starts."""
        low, high = 0, ENOUGH[limit]
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._run(vcpus, placement, {**ENOUGH, limit: middle}, lambda *_: None)
            except BenchError as error:
                if not any(words in str(error) for words in REASONS):
                    raise
                low = middle
            else:
                high = middle
        return high

    def _run(
        self,
        vcpus: int,
        placement: str,
        limits: dict[str, int],
        look: Callable[[ControlGroup, Started], Value],
    ) -> Value:
        self._number += 1
        jail = Jail(f"limits-{os.getpid()}-{self._number}", UID, UID, self._folder)
        machine = {"vcpu_count": vcpus, "mem_size_mib": MEMORY_MIB, "vcpu_placement": placement}
        content = {
            "boot-source": {"kernel_image_path": jail.add(build("first"), "kernel"), "boot_args": ""},
            "drives": [],
            "machine-config": machine,
        }
        config = jail.write(json.dumps(content), "config.json")
        group = ControlGroup(jail.id)
        options = group.options(limits["pids.max"], limits["no-file"])
        command = jail.command(options, ("--no-api", "--config-file", config))
        try:
            with start([str(LAUNCHERS / "jailer"), *command[1:]], self._account) as started:
                started.pipes.wait_for(FIRST_BYTE)
                time.sleep(SETTLE_SECONDS)
                found = look(group, started)
                started.end()
        finally:
            group.wait_removed()
            jail.remove()
        return found


def report_memory(microvms: Microvms, counts: list[int], placements: list[str]) -> None:
    """Print what each kind of microVM takes."""
    rows = []
    for placement in placements:
        for vcpus in counts:
            needs = microvms.measure(vcpus, placement)
            own = needs.peak - needs.shared
            rows.append(
                [f"{vcpus} {placement}", str(needs.tasks)]
                + [f"{value / MIB:.1f}" for value in (needs.peak, needs.shared, own, needs.kernel)]
            )
    table(("vCPUs", "tasks", "peak MiB", "of it guest RAM", "of it ours", "of that the kernel's"), rows)


def report_limits(microvms: Microvms, counts: list[int], placements: list[str]) -> None:
    """Print the least limits with which a microVM starts."""
    rows = []
    for placement in placements:
        for vcpus in counts:
            found = [str(microvms.least(limit, vcpus, placement)) for limit in ENOUGH]
            rows.append([f"{vcpus} {placement}", *found])
    table(("vCPUs", *(f"least {limit}" for limit in ENOUGH)), rows)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="./dev bench limits", description=__doc__.splitlines()[0])
    parser.add_argument("--vcpus", default="1,2,4,8", help="numbers of vCPUs; default: %(default)s")
    parser.add_argument("--placements", default="Grouped,Split", help="default: %(default)s")
    parser.add_argument("--memory-only", action="store_true", help="do not look for the least limits")
    options = parser.parse_args()
    counts = [int(each) for each in options.vcpus.split(",")]
    placements = options.placements.split(",")
    folder = Path(tempfile.mkdtemp(prefix="cellblock-bench-"))
    folder.chmod(0o755)
    try:
        with CpuAccount() as account:
            microvms = Microvms(folder, account)
            report_memory(microvms, counts, placements)
            if not options.memory_only:
                print()
                report_limits(microvms, counts, placements)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
