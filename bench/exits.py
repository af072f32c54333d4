"""`./dev bench exits`: what an exit costs, by the way it is answered; next to a bare KVM_RUN loop and to QEMU.

The product runs as a client runs it: jailed, one worker, filters on. The guest says when it begins and when it has made
its exits (tests/guests/exits.S), and its console is the clock. Every round measures each case once; ratios are formed
within a round. docs/benchmarks.md says what each figure means.
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
from typing import NamedTuple

from bench.measure import BenchError, CpuAccount, Started, median, spread, start, table, verdict
from bench.startup import MEMORY_MIB, UID, qemu_command
from devtool.project import LAUNCHERS
from ipc.guest_memory import GuestMemory
from ipc.shared_memory import create_shared
from lab.client import Jail
from tests.guests.build import build
from vcpu_worker.cpu import boot_state, cpuid
from vcpu_worker.cpu.topology import Topology
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.system import KvmSystem
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.kvm.vm import KvmVm
from vmm.boot.cmdline import Cmdline
from vmm.boot.loader import load_kernel
from vmm.devices.legacy.exerciser import COUNT_POSTED, COUNT_SYNCHRONOUS, EXERCISER_PORT, LAST_COUNT, LOCAL
from vmm.layout import ram_regions

READ, WRITE, PRINT = 0, 1, 2  # KIND of the guest
LSR = 0x3FD
THR = 0x3F8
BEGIN, END = b"<", b">"

BARE = "bare KVM_RUN loop in Python: IN of LSR, not answered"
QEMU = "QEMU microvm: IN of LSR"
QEMU_WRITE = "QEMU microvm: OUT to a port without a device"
LOCAL_LSR = "local: IN of LSR"
LOCAL_EXERCISER = "local: IN of the exerciser's constant"
NOBODY = "nobody: OUT to a port without a device"
PRINTED = "posted, may wait: OUT to THR, printed by the controller"
QEMU_PRINTED = "QEMU microvm: OUT to THR, printed"
POSTED = "posted: OUT, counted by the controller"
CALLED_OUT = "synchronous: OUT, counted by the controller"
CALLED_IN = "synchronous: IN of the last count"
AIM = 1.2


class Way(NamedTuple):
    """One way of answering: what the guest does, and how often (a posted or local exit is cheap, a call is not)."""

    kind: int
    port: int
    share: float = 1.0


PRODUCT = {
    LOCAL_LSR: Way(READ, LSR),
    LOCAL_EXERCISER: Way(READ, EXERCISER_PORT + LOCAL),
    NOBODY: Way(WRITE, 0x700),
    PRINTED: Way(PRINT, THR),
    POSTED: Way(WRITE, EXERCISER_PORT + COUNT_POSTED),
    CALLED_OUT: Way(WRITE, EXERCISER_PORT + COUNT_SYNCHRONOUS, 0.25),
    CALLED_IN: Way(READ, EXERCISER_PORT + LAST_COUNT, 0.25),
}


class Cost(NamedTuple):
    """Microseconds of wall and of CPU time (all processes) for one exit."""

    wall: float
    cpu: float


class Bench:
    """The cases; ``exits`` is how many each makes."""

    def __init__(self, folder: Path, account: CpuAccount, exits: int) -> None:
        self._folder = folder
        self._account = account
        self._exits = exits

    def _guest(self, path: Way) -> tuple[Path, int]:
        rounds = int(self._exits * path.share)
        return build("exits", {"ROUNDS": rounds, "KIND": path.kind, "PORT": path.port}), rounds

    def _between(self, started: Started, rounds: int) -> Cost:
        """Measure from the guest's first byte to its last."""
        begin = started.pipes.wait_for(BEGIN)
        cpu = self._account.read()
        end = started.pipes.wait_for(END)
        cost = Cost((end - begin) * 1e6 / rounds, (self._account.read() - cpu) * 1e3 / rounds)
        started.end()
        return cost

    def product(self, path: Way) -> Cost:
        """The product, jailed."""
        guest, rounds = self._guest(path)
        jail = Jail(f"bench-{os.getpid()}", UID, UID, self._folder / "jails")
        config = {
            "boot-source": {"kernel_image_path": jail.add(guest, "kernel"), "boot_args": ""},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        }
        arguments = ("--no-api", "--exerciser", "--config-file", jail.write(json.dumps(config), "config.json"))
        with start([str(LAUNCHERS / "jailer"), *jail.command((), arguments)[1:]], self._account) as started:
            cost = self._between(started, rounds)
        jail.remove()
        return cost

    def qemu(self, path: Way) -> Cost:
        """QEMU with the same guest."""
        guest, rounds = self._guest(path)
        with start(qemu_command(guest), self._account) as started:
            return self._between(started, rounds)

    def bare(self) -> Cost:
        """The same guest in a process that calls KVM_RUN and looks at the exit reason, in a thread as a worker does."""
        guest, rounds = self._guest(PRODUCT[LOCAL_LSR])
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._account.join()
                cpu = self._account.read()
                seconds = _bare_loop(guest, rounds)
                used = self._account.read() - cpu
                os.write(write_end, json.dumps([seconds * 1e6 / rounds, used * 1e3 / rounds]).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(write_end)
        answer = os.read(read_end, 4096)
        os.close(read_end)
        if os.waitpid(pid, 0)[1]:
            raise BenchError("the bare loop failed")
        return Cost(*json.loads(answer))

    def cases(self) -> dict[str, Callable[[], Cost]]:
        """Return what every round measures, in order."""
        cases: dict[str, Callable[[], Cost]] = {BARE: self.bare, QEMU: lambda: self.qemu(PRODUCT[LOCAL_LSR])}
        for name, path in PRODUCT.items():
            cases[name] = lambda path=path: self.product(path)  # type: ignore[misc]
        cases[QEMU_PRINTED] = lambda: self.qemu(PRODUCT[PRINTED])
        cases[QEMU_WRITE] = lambda: self.qemu(PRODUCT[NOBODY])
        return cases


def _bare_loop(guest: Path, rounds: int) -> float:
    """Run the guest in a thread of its own; return the seconds that ``rounds`` exits took."""
    import _thread

    vcpu = _bare_vcpu(guest)
    done = _thread.allocate_lock()
    done.acquire()
    seconds: list[float] = []

    def loop() -> None:
        try:
            seconds.append(_run(vcpu, rounds))
        finally:
            done.release()

    _thread.start_new_thread(loop, ())
    done.acquire()
    return seconds[0]


def _run(vcpu: KvmVcpu, rounds: int) -> float:
    import fcntl

    ioctl, descriptor, request, run32, reason = fcntl.ioctl, vcpu.descriptor, abi.KVM_RUN, vcpu.run32, 2
    ioctl(descriptor, request)  # the guest's first byte
    begin = time.perf_counter()
    for _ in range(rounds):
        ioctl(descriptor, request)
        if run32[reason] != abi.EXIT_IO:
            raise BenchError(f"exit reason {run32[reason]}")
    return time.perf_counter() - begin


#: What guests use stays mapped.
_MEMORIES: list[GuestMemory] = []


def _bare_vcpu(guest: Path) -> KvmVcpu:
    """A VM with the guest loaded by the product's loader and a vCPU set up as a worker does it."""
    system = KvmSystem(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    size = MEMORY_MIB << 20
    descriptor = create_shared("bench", size)
    regions = ram_regions(size)
    memory = GuestMemory(descriptor, size, regions)
    kernel = os.open(guest, os.O_RDONLY | os.O_CLOEXEC)
    registers = load_kernel(memory, kernel, Cmdline("")).registers
    vm = KvmVm(system)
    for slot, region in enumerate(regions):
        vm.set_memory_region(slot, region.guest_address, region.size, memory.address + region.offset)
    _MEMORIES.append(memory)
    vcpu = KvmVcpu(vm, 0, system.vcpu_mmap_size())
    vcpu.set_cpuid(cpuid.normalise(system.supported_cpuid(), Topology(0, 1, False)))
    vcpu.set_sregs(boot_state.boot_sregs(vcpu.get_sregs(), registers))
    vcpu.set_regs(boot_state.boot_regs(registers))
    vcpu.run64[abi.RUN_VALID_REGS // 8] = abi.SYNC_X86_REGS | abi.SYNC_X86_SREGS | abi.SYNC_X86_EVENTS
    return vcpu


def _report(costs: dict[str, list[Cost]]) -> None:
    def ratio(name: str, to: str) -> float:
        return median([ours.wall / theirs.wall for ours, theirs in zip(costs[name], costs[to], strict=True)])

    rows = []
    for name, measured in costs.items():
        per_second = f"{1e6 / median([cost.wall for cost in measured]):,.0f}"
        wall, cpu = (spread([cost[column] for cost in measured]) for column in (0, 1))
        rows.append([name, wall, cpu, per_second, f"{ratio(name, BARE):.2f}", f"{ratio(name, QEMU):.2f}"])
    table(("medians (quartiles)", "wall µs", "CPU µs", "exits/s", "wall / bare", "wall / QEMU"), rows)
    print()
    for to in (BARE, QEMU):
        print(verdict(f"local answer / {to}", ratio(LOCAL_LSR, to), AIM))


def main() -> int:
    """Measure and print; exit status 0 whether the aims are reached or not."""
    parser = argparse.ArgumentParser(prog="./dev bench exits", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--exits", type=int, default=20_000, help="exits of a case; default: %(default)s")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cellblock-bench-"))
    try:
        with CpuAccount() as account:
            cases = Bench(folder, account, options.exits).cases()
            costs: dict[str, list[Cost]] = {name: [] for name in cases}
            for number in range(options.rounds + 1):
                for name, case in cases.items():
                    cost = case()
                    if number:  # the first round builds guests and fills caches
                        costs[name].append(cost)
        _report(costs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
