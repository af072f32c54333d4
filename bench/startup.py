"""`./dev bench startup`: how long a start takes, step by step, and what a microVM costs in memory; next to QEMU.

Every round measures each case once, one after the other, so that whatever else the machine does hits all alike; ratios
are formed within a round. docs/benchmarks.md says what each figure means.
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

from bench import template
from bench.control_group import MIB, ControlGroup
from bench.measure import BenchError, CpuAccount, Started, median, spread, start, table, verdict
from devtool.project import LAUNCHERS
from lab.client import Jail, descendants, request
from tests.guests.build import build

FIRST_BYTE = b"!"
MEMORY_MIB = 128
SETTLE_SECONDS = 0.15
UID = 10000
QEMU = "/usr/bin/qemu-system-x86_64"

QEMU_START = "QEMU microvm: start → first instruction"
DIRECT_API = "firecracker: start → API ready"
JAILER_API = "jailer: start → API ready"
DIRECT_COLD = "firecracker: start → first instruction"
JAILER_COLD = "jailer: start → first instruction"
WARM_DIRECT_API = "warm template, firecracker: request → API ready"
WARM_JAILER_API = "warm template, jailer: request → API ready"
WARM_DIRECT = "warm template, firecracker: request → first instruction"
WARM_JAILER = "warm template, jailer: request → first instruction"
INSTANCE_START = "jailer: InstanceStart → first instruction"

AIMS = ((JAILER_COLD, 2.0), (DIRECT_COLD, 2.0), (WARM_JAILER, 0.2), (WARM_DIRECT, 0.2), (INSTANCE_START, 0.15))
PRIVATE_DIRTY_AIM_MIB = 7.0
PROPORTIONAL_ANONYMOUS_AIM_MIB = 16.0
#: What is charged to the microVM's control group at the most, beside the memory of its guest.
PEAK_AIM_MIB = 10.0

Value = TypeVar("Value")
Launch = Callable[[str, list[str]], Started]


class Sample(NamedTuple):
    """One measurement: milliseconds of wall and CPU time."""

    wall: float
    cpu: float


def qemu_command(kernel: Path) -> list[str]:
    """QEMU's smallest machine. Without arch-capabilities since the development host refuses that MSR."""
    # fmt: off
    return [
        QEMU, "-M", "microvm", "-enable-kvm", "-cpu", "host,arch-capabilities=off", "-m", str(MEMORY_MIB),
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel", str(kernel),
    ]
    # fmt: on


class Bench:
    """The cases. ``folder`` is scratch space for sockets, configuration and jails."""

    def __init__(self, folder: Path, account: CpuAccount) -> None:
        self._folder = folder
        self._account = account
        self._kernel = build("first")
        self._number = 0

    # ------------------------------------------------------------ how a microVM is started

    def cold(self, program: str, arguments: list[str]) -> Started:
        """A start from nothing: the program itself."""
        return start([str(LAUNCHERS / program), *arguments], self._account)

    def _warm(self, program: str, arguments: list[str]) -> Started:
        return template.start(program, arguments, self._account)

    def warm_traced(self, program: str, arguments: list[str]) -> Started:
        """A traced start from a warm template."""
        return template.start(program, arguments, self._account, traced=True)

    def _traced(self, program: str, arguments: list[str]) -> Started:
        return start([str(LAUNCHERS / program), *arguments], self._account, {"CELLBLOCK_TIMELINE": "1"})

    def _config(self, kernel: str) -> dict[str, object]:
        return {
            "boot-source": {"kernel_image_path": kernel, "boot_args": ""},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        }

    def _jail(self) -> Jail:
        self._number += 1
        return Jail(f"bench-{os.getpid()}-{self._number}", UID, UID, self._folder / "jails")

    # ------------------------------------------------------------ cases

    def qemu(self) -> Sample:
        """Start of QEMU until the guest's byte."""
        with start(qemu_command(self._kernel), self._account) as started:
            sample = Sample(*started.spent(started.pipes.wait_for(FIRST_BYTE)))
            started.end()
        return sample

    def direct_first(self, launch: Launch) -> Sample:
        """`firecracker --config-file` until the guest's byte."""
        config = self._folder / "config.json"
        config.write_text(json.dumps(self._config(str(self._kernel))))
        with launch("firecracker", ["--no-api", "--config-file", str(config)]) as started:
            sample = Sample(*started.spent(started.pipes.wait_for(FIRST_BYTE)))
            started.end()
        return sample

    def jailer_first(self, launch: Launch) -> Sample:
        """`jailer … -- --config-file` until the guest's byte."""
        jail = self._jail()
        config = jail.write(json.dumps(self._config(jail.add(self._kernel, "kernel"))), "config.json")
        command = jail.command((), ("--no-api", "--config-file", config))
        with launch("jailer", command[1:]) as started:
            sample = Sample(*started.spent(started.pipes.wait_for(FIRST_BYTE)))
            started.end()
        jail.remove()
        return sample

    def direct_api(self, launch: Launch) -> Sample:
        """`firecracker` until GET /version is answered."""
        path = self._folder / "api.socket"
        with launch("firecracker", ["--api-sock", str(path)]) as started:
            sample = Sample(*started.spent(_api_ready(path, started)))
            started.end()
        path.unlink(missing_ok=True)
        return sample

    def jailer_api(self, launch: Launch) -> Sample:
        """`jailer` until GET /version is answered."""
        jail = self._jail()
        with launch("jailer", jail.command()[1:]) as started:
            sample = Sample(*started.spent(_api_ready(jail.root / "run" / "firecracker.socket", started)))
            started.end()
        jail.remove()
        return sample

    def instance_start(self) -> Sample:
        """A jailed microVM that is configured by API and has settled: InstanceStart until the guest's byte."""
        jail = self._jail()
        kernel = jail.add(self._kernel, "kernel")
        path = jail.root / "run" / "firecracker.socket"
        with self.cold("jailer", jail.command()[1:]) as started:
            _api_ready(path, started)
            self._must(path, "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB})
            self._must(path, "/boot-source", {"kernel_image_path": kernel, "boot_args": ""})
            time.sleep(SETTLE_SECONDS)
            sample = self._instance_start(path, started)
            started.end()
        jail.remove()
        return sample

    def _instance_start(self, path: Path, started: Started) -> Sample:
        cpu = self._account.read()
        moment = time.monotonic()
        pid = os.fork()
        if pid == 0:  # the answer is not waited for here: the guest may be faster
            try:
                self._must(path, "/actions", {"action_type": "InstanceStart"})
                os._exit(0)
            finally:
                os._exit(1)
        wall = (started.pipes.wait_for(FIRST_BYTE) - moment) * 1e3
        sample = Sample(wall, self._account.read() - cpu)
        if os.waitpid(pid, 0)[1]:
            raise BenchError("InstanceStart was refused")
        return sample

    @staticmethod
    def _must(path: Path, target: str, body: object) -> None:
        reply = request(path, "PUT", target, body)
        if reply.status != 204:
            raise BenchError(f"PUT {target}: {reply.status} {reply.body}")

    def cases(self) -> dict[str, Callable[[], Sample]]:
        """Return what every round measures, in order."""
        warm = self._warm
        return {
            QEMU_START: self.qemu,
            JAILER_COLD: lambda: self.jailer_first(self.cold),
            DIRECT_COLD: lambda: self.direct_first(self.cold),
            WARM_JAILER: lambda: self.jailer_first(warm),
            WARM_DIRECT: lambda: self.direct_first(warm),
            INSTANCE_START: self.instance_start,
            JAILER_API: lambda: self.jailer_api(self.cold),
            DIRECT_API: lambda: self.direct_api(self.cold),
            WARM_JAILER_API: lambda: self.jailer_api(warm),
            WARM_DIRECT_API: lambda: self.direct_api(warm),
        }

    # ------------------------------------------------------------ steps and memory

    def steps(self, launch: Launch | None = None) -> list[tuple[int, str, float, float]]:
        """One traced start of `jailer`: cell, step, milliseconds since the start, CPU milliseconds of that cell."""
        jail = self._jail()
        config = jail.write(json.dumps(self._config(jail.add(self._kernel, "kernel"))), "config.json")
        with (launch or self._traced)("jailer", jail.command((), ("--no-api", "--config-file", config))[1:]) as started:
            first = started.pipes.wait_for(FIRST_BYTE)
            errors = started.end()
        jail.remove()
        line = next((line for line in errors.splitlines() if line.startswith('{"timeline"')), None)
        if line is None:
            raise BenchError(f"no timeline in:\n{errors[-2000:]}")
        start_ms = started.start * 1e3
        marks = [(cell, step, at / 1e6 - start_ms, cpu / 1e6) for cell, step, at, cpu in json.loads(line)["timeline"]]
        end = (first - started.start) * 1e3
        return [mark for mark in marks if mark[2] <= end] + [(-1, "the guest's byte was read", end, 0.0)]

    def settled(self, look: Callable[[int], Value]) -> dict[str, Value]:
        """Start a jailed microVM, cold; return what ``look`` says of each cell (a pid) when the guest sleeps."""
        jail = self._jail()
        config = jail.write(json.dumps(self._config(jail.add(self._kernel, "kernel"))), "config.json")
        with self.cold("jailer", jail.command((), ("--no-api", "--config-file", config))[1:]) as started:
            started.pipes.wait_for(FIRST_BYTE)
            time.sleep(SETTLE_SECONDS)
            cells = {Path(f"/proc/{pid}/comm").read_text().strip(): look(pid) for pid in descendants(started.pid)}
            started.end()
        jail.remove()
        return cells

    def peak(self) -> tuple[float, float]:
        """Start a jailed microVM, cold; return the peak of its control group and the shared memory in it, in MiB."""
        jail = self._jail()
        config = jail.write(json.dumps(self._config(jail.add(self._kernel, "kernel"))), "config.json")
        group = ControlGroup(jail.id)
        with self.cold("jailer", jail.command(group.options(), ("--no-api", "--config-file", config))[1:]) as started:
            started.pipes.wait_for(FIRST_BYTE)
            time.sleep(SETTLE_SECONDS)
            found = group.peak() / MIB, group.part("shmem") / MIB
            started.end()
        group.wait_removed()
        jail.remove()
        return found

    def memory(self) -> dict[str, dict[str, float]]:
        """Memory of each cell of a cold-started, jailed microVM whose guest sleeps, and of QEMU: MiB by kind."""
        cells = self.settled(_rollup)
        with start(qemu_command(self._kernel), self._account) as started:
            started.pipes.wait_for(FIRST_BYTE)
            time.sleep(SETTLE_SECONDS)
            qemu = _rollup(started.pid)
            started.end()
        return {**cells, "QEMU": qemu}


def _api_ready(path: Path, started: Started) -> float:
    """Wait until the API answers; return when. A client that looks every 0.2 ms."""
    deadline = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > deadline:
            raise BenchError(f"no API socket; the program printed:\n{started.pipes.tail()}")
        time.sleep(0.0002)
    while True:
        try:
            reply = request(path, "GET", "/version")
            moment = time.monotonic()
        except ConnectionRefusedError:
            time.sleep(0.0002)  # bound, not listening yet
            continue
        if reply.status != 200:
            raise BenchError(f"GET /version: {reply.status}")
        return moment


KINDS = ("Private_Dirty", "Pss_Anon", "Rss")


def _rollup(pid: int) -> dict[str, float]:
    """Read /proc/PID/smaps_rollup: MiB."""
    values = dict.fromkeys(KINDS, 0.0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in values:
            values[name] = int(rest.split()[0]) / 1024
    return values


# ---------------------------------------------------------------- report


def _report_times(samples: dict[str, list[Sample]]) -> dict[str, float]:
    """Print the times; return each case's wall ratio to QEMU."""
    baseline = samples[QEMU_START]
    rows, ratios = [], {}
    for name, measured in samples.items():
        wall = median([s.wall / q.wall for s, q in zip(measured, baseline, strict=True)])
        cpu = median([s.cpu / q.cpu for s, q in zip(measured, baseline, strict=True)])
        ratios[name] = wall
        wall_ms, cpu_ms = (spread([sample[column] for sample in measured]) for column in (0, 1))
        rows.append([name, wall_ms, cpu_ms, f"{wall:.2f}", f"{cpu:.2f}"])
    table(("medians (quartiles)", "wall ms", "CPU ms", "wall / QEMU", "CPU / QEMU"), rows)
    return ratios


def _report_steps(title: str, traces: list[list[tuple[int, str, float, float]]]) -> None:
    """Print the median moment of every step that all traces have in common, in the order of the first trace."""
    moments: list[dict[tuple[int, str, int], tuple[float, float]]] = []
    for trace in traces:
        seen: dict[tuple[int, str], int] = {}
        found = {}
        for cell, step, at, cpu in trace:
            number = seen[cell, step] = seen.get((cell, step), 0) + 1
            found[cell, step, number] = (at, cpu)
        moments.append(found)
    names = {-1: "", 0: "supervisor", 1: "controller", 2: "vcpu 0"}
    rows = []
    for key in moments[0]:
        if all(key in found for found in moments):
            at = median([found[key][0] for found in moments])
            cpu = median([found[key][1] for found in moments])
            rows.append((at, [f"{names[key[0]]:<10}  {key[1]}", f"{at:.1f}", f"{cpu:.1f}" if key[0] >= 0 else ""]))
    rows.sort(key=lambda row: row[0])
    table((f"{title}: a step begins", "ms since the start", "CPU ms of the cell"), [row for _, row in rows])


def _report_memory(runs: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    cells = list(runs[0])
    medians = {cell: {kind: median([run[cell][kind] for run in runs]) for kind in KINDS} for cell in cells}
    ours = [cell for cell in cells if cell != "QEMU"]
    sums = {kind: sum(medians[cell][kind] for cell in ours) for kind in KINDS}
    rows = [[cell, *(f"{medians[cell][kind]:.2f}" for kind in KINDS)] for cell in ours]
    rows.append(["sum of the cells", *(f"{sums[kind]:.2f}" for kind in KINDS)])
    rows.append(["QEMU", *(f"{medians['QEMU'][kind]:.2f}" for kind in KINDS)])
    table(("memory, MiB", "private dirty", "proportional anonymous", "RSS"), rows)
    return sums


def main() -> int:
    """Measure and print; exit status 0 whether the aims are reached or not."""
    parser = argparse.ArgumentParser(prog="./dev bench startup", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--only", default="", help="only cases whose name contains this (QEMU always runs)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cellblock-bench-"))
    try:
        with CpuAccount() as account:
            bench = Bench(folder, account)
            cases = {name: case for name, case in bench.cases().items() if options.only in name or name == QEMU_START}
            samples: dict[str, list[Sample]] = {name: [] for name in cases}
            for number in range(options.rounds + 1):
                for name, case in cases.items():
                    sample = case()
                    if number:  # the first round fills caches
                        samples[name].append(sample)
            traces = [bench.steps() for _ in range(min(options.rounds, 5))]
            warm_traces = [bench.steps(bench.warm_traced) for _ in range(min(options.rounds, 5))]
            memory = [bench.memory() for _ in range(3)]
            peaks = [bench.peak() for _ in range(3)]
        ratios = _report_times(samples)
        print()
        _report_steps("jailer, cold", traces)
        print()
        _report_steps("jailer from a warm template", warm_traces)
        print()
        sums = _report_memory(memory)
        print()
        peak, shared = (median([each[column] for each in peaks]) for column in (0, 1))
        print(f"peak of the control group: {peak:.1f} MiB, of it guest memory: {shared:.1f} MiB")
        print()
        for name, limit in AIMS:
            if name in ratios:
                print(verdict(f"{name}, wall / QEMU", ratios[name], limit))
        print(verdict("sum of private dirty, MiB", sums["Private_Dirty"], PRIVATE_DIRTY_AIM_MIB))
        print(verdict("sum of proportional anonymous, MiB", sums["Pss_Anon"], PROPORTIONAL_ANONYMOUS_AIM_MIB))
        print(verdict("peak of the control group beside guest memory, MiB", peak - shared, PEAK_AIM_MIB))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
