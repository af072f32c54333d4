"""What the run loop costs: an exit answered locally, next to a loop of KVM_RUN that only reads the exit reason.

    python -m bench.exits_inner [ROUNDS]

Same process, same vCPU, same guest (IN from one port for ever), rounds of both in turn; medians and their ratio.
"""

from __future__ import annotations

import fcntl
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

from ipc import device_pages, exit_ring
from ipc.guest_mapping import GuestMapping
from ipc.messages.records import Window
from ipc.shared_memory import create_published, create_shared, map_shared
from tests.guests.build import build
from tests.harness.workers import LOCAL, MODES, PARAMETERS, boot_registers, load_elf, write_boot_structures
from vcpu_worker.cpu import boot_state, cpuid
from vcpu_worker.cpu.topology import Topology
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.system import KvmSystem
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.kvm.vm import KvmVm
from vcpu_worker.run_loop import RunLoop
from vcpu_worker.vcpu_thread import Completions, VcpuThread, install_kick_handler
from vcpu_worker.windows import Windows

MEMORY_SIZE = 4 << 20
EXITS = 10_000
#: They are unmapped with their last reference.
_MAPPINGS: list[GuestMapping] = []


def make_vcpu() -> KvmVcpu:
    """A vCPU in the guest's mode `local`."""
    system = KvmSystem(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    descriptor = create_shared("bench", MEMORY_SIZE)
    memory = map_shared(descriptor, MEMORY_SIZE)
    write_boot_structures(memory)
    entry = load_elf(memory, build("worker"))
    memory[PARAMETERS] = MODES.index("local")
    vm = KvmVm(system)
    mapping = GuestMapping(descriptor, MEMORY_SIZE)
    vm.set_memory_region(0, 0, MEMORY_SIZE, mapping.address)
    vcpu = KvmVcpu(vm, 0, system.vcpu_mmap_size())
    _MAPPINGS.append(mapping)
    vcpu.set_cpuid(cpuid.normalise(system.supported_cpuid(), Topology(0, 1, False)))
    boot = boot_registers(entry)
    vcpu.set_sregs(boot_state.boot_sregs(vcpu.get_sregs(), boot))
    vcpu.set_regs(boot_state.boot_regs(boot))
    return vcpu


def make_loop(vcpu: KvmVcpu) -> RunLoop:
    """The product's run loop over it; the port is published for local answers."""
    _, mapping = create_published("page", device_pages.DEVICE_PAGE_SIZE)
    page = device_pages.DevicePage(mapping)
    slot = page.allocate(1)
    page.publish(slot, 0x60, device_pages.FLAG_READ_LOCAL)
    ring_fd = create_shared("ring", exit_ring.RING_SIZE)
    ring = map_shared(ring_fd, exit_ring.RING_SIZE)
    exit_ring.initialise(ring)
    producer = exit_ring.ExitRingProducer(ring, os.eventfd(0), os.eventfd(0))
    windows = Windows()
    windows.set([Window(LOCAL, 1, slot)], [], device_pages.SLOT_COUNT)
    return RunLoop(vcpu, producer, device_pages.slots_of(mapping), windows)


def bare(vcpu: KvmVcpu, *argument: int) -> float:
    """Microseconds per exit of the least that Python can do (``argument``: ioctl's third, which it does not need)."""
    ioctl, descriptor, request, run32, word = fcntl.ioctl, vcpu.descriptor, abi.KVM_RUN, vcpu.run32, 2
    start = time.perf_counter()
    if argument:
        for _ in range(EXITS):
            ioctl(descriptor, request, 0)
            if run32[word] != abi.EXIT_IO:
                raise RuntimeError(f"exit reason {run32[word]}")
    else:
        for _ in range(EXITS):
            ioctl(descriptor, request)
            if run32[word] != abi.EXIT_IO:
                raise RuntimeError(f"exit reason {run32[word]}")
    return (time.perf_counter() - start) / EXITS * 1e6


def product(loop: RunLoop, thread: VcpuThread) -> Callable[[], float]:
    """The product's loop in its thread, for about as long as the bare one takes."""

    def measure() -> float:
        stopped = threading.Event()
        times: list[float] = []

        def job() -> None:
            times.append(time.perf_counter())
            loop.run()
            times.append(time.perf_counter())
            stopped.set()

        before = loop.exits()
        thread.submit(job, lambda result: None)
        time.sleep(EXITS * 12e-6)
        while not stopped.is_set():
            loop.ask_to_stop()
            thread.kick()
            stopped.wait(0.001)
        loop.allow_to_run()
        return (times[1] - times[0]) / (loop.exits() - before) * 1e6

    return measure


def main() -> int:
    """Print the medians and the ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    install_kick_handler()
    vcpu = make_vcpu()
    loop = make_loop(vcpu)
    thread = VcpuThread("bench", Completions())
    thread.start()
    measure = product(loop, thread)
    for valid_regs, name in ((0, "no black box"), (7, "with the black box")):
        vcpu.run64[abi.RUN_VALID_REGS // 8] = valid_regs
        results = [(bare(vcpu), measure(), bare(vcpu, 0)) for _ in range(rounds)]
        least, ours, with_argument = (statistics.median(column) for column in zip(*results, strict=True))
        print(
            f"{name}: bare loop {least:.2f} µs (with a third argument {with_argument:.2f} µs), "
            f"run loop {ours:.2f} µs, ratio {ours / least:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
