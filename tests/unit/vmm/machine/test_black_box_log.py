"""What the log has of a microVM that was ended: its last registers, and no line that a worker forged."""

from __future__ import annotations

import os
import re
import signal

from ipc.messages.worker import Configured, VcpuExited
from tests.harness.cells import (
    StandInWorker,
    run_page,
)
from tests.harness.machine import when_resumed


def test_the_black_box_shows_the_registers_of_the_last_exit(make, log):
    def configure(worker: StandInWorker, sequence: int) -> None:
        worker.take_descriptors(5)
        worker.hand_over_vcpu(0, run_page(reason=6, rip=0xFFFF_FFFF_8123_4567))
        worker.send(Configured(1), sequence)

    machine = make(lambda worker: worker.serve_with(Configure=configure))
    machine.vmm.resume_vm()
    os.kill(machine.worker.pid, signal.SIGKILL)
    machine.ended()
    line = next(line for line in log().splitlines() if "rip=" in line)
    assert "vCPU 0: last exit mmio; rip=0xffffffff81234567 rflags=0x111 rax=0x100 rbx=0x101" in line
    assert "cr0=0x80050033 cr2=0xdead0000 cr3=0x1000 cr4=0x20." in line


def test_what_workers_say_cannot_forge_log_lines(make, log):
    def exit_with_lines(worker: StandInWorker) -> None:
        worker.send(VcpuExited(0, "a\nb", 1, (), "\x1b[2J\nForged line"))
        worker.serve()

    machine = make(when_resumed(exit_with_lines))
    machine.resume()
    assert machine.ended() == 1
    assert not re.search(r"^Forged", log(), re.MULTILINE)
    assert "\x1b" not in log()
