"""A vCPU with its thread, and what the worker's control thread knows of it."""

from __future__ import annotations

from vcpu_worker.machine import Vcpu
from vcpu_worker.reporting import FinalExit
from vcpu_worker.run_loop import RunLoop
from vcpu_worker.vcpu_thread import VcpuThread


class Runner:
    """Lets one vCPU run, and remembers whether it does. All methods are for the control thread."""

    __slots__ = ("final", "held", "running", "thread", "vcpu")

    def __init__(self, vcpu: Vcpu, thread: VcpuThread) -> None:
        self.vcpu = vcpu
        self.thread = thread
        self.running = False
        #: It may not start before the other workers are ready for it.
        self.held = False
        self.final: FinalExit | None = None

    @property
    def loop(self) -> RunLoop:
        """The run loop; there is one after Configure."""
        loop = self.vcpu.loop
        assert loop is not None
        return loop

    def stop(self) -> None:
        """Ask the vCPU to leave KVM_RUN and interrupt it."""
        self.loop.ask_to_stop()
        self.thread.kick()
