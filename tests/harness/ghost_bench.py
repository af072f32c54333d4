"""One ghost in a VM of its own, with its thread."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from ipc.launch_plan import Assignment
from ipc.messages.ghosts import QuiescentGhost
from vcpu_worker.cpu import boot_state, cpuid
from vcpu_worker.cpu.topology import Topology
from vcpu_worker.ghosts import watch
from vcpu_worker.ghosts.ghost import BUSY, Ghost
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.system import KvmSystem
from vcpu_worker.machine import Machine
from vcpu_worker.vcpu_thread import Completions, VcpuThread, install_kick_handler

VECTOR = 0x55


class Bench:
    """The ghost of vCPU 1 with its thread."""

    def __init__(self) -> None:
        install_kick_handler()
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.machine = Machine(KvmSystem(descriptor), Assignment(0, (0,), (1,)))
        os.close(descriptor)
        assert self.machine._stub is not None
        self.machine._stub.give_to(self.machine.vm)
        self.told: list[tuple[int, int, int]] = []
        self.recovered: list[str] = []
        self.completions = Completions()
        self.thread = VcpuThread("ghost 1", self.completions)
        self.thread.start()
        (kvm,) = self.machine.ghost_vcpus
        tell = lambda *what: self.completions.put(self.told.append, what)  # noqa: E731
        recovered = lambda vcpu, text: self.completions.put(self.recovered.append, text)  # noqa: E731
        self.ghost = Ghost(kvm, tell, recovered, single_step=False)
        self.results: list[object] = []
        for each in (self.machine.vcpus[0].kvm, kvm):
            each.set_cpuid(cpuid.normalise(self.machine.supported_cpuid, Topology(each.index, 2, False)))
            each.set_lapic(boot_state.boot_lapic(each.get_lapic()))
        self.do(watch.start)

    def send(self, data: int) -> None:
        self.machine.vm.signal_msi(abi.MSI_ADDRESS_BASE | 1 << abi.MSI_DESTINATION_SHIFT, data)

    def do(self, job: object) -> object:
        self.thread.submit(job, self.results.append)  # type: ignore[arg-type]
        return self.result()

    def result(self) -> object:
        self.await_(lambda: bool(self.results))
        result = self.results.pop()
        if isinstance(result, Exception):
            raise result
        return result

    def run(self) -> None:
        self.ghost.allow_to_run()
        self.thread.submit(self.ghost.run, self.results.append)

    def stop(self) -> object:
        self.ghost.ask_to_stop()
        while not self.results:
            self.thread.kick()
            self.turn(1)
        return self.result()

    def park(self) -> None:
        """Stop it when nothing is on its way through it."""
        while self.stop() == BUSY:
            self.run()
            self.turn(1)

    def turn(self, timeout_ms: int) -> None:
        poll = select.poll()
        poll.register(self.completions.eventfd, select.POLLIN)
        poll.poll(timeout_ms)
        self.completions.deliver()

    def await_(self, condition: object) -> None:
        while not condition():  # type: ignore[operator]
            self.turn(1000)

    def expect(self, *event: int) -> None:
        self.await_(lambda: bool(self.told))
        assert self.told.pop(0) == event

    def quiescence(self) -> QuiescentGhost:
        held = self.do(self.ghost.quiescence)
        assert isinstance(held, QuiescentGhost)
        return held


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.thread.end()
