"""Controller and builder in the test's process, on real workers with real KVM VMs; the supervisor is a stand-in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from base import faults
from device_cell import main as device_main
from ipc import descriptors
from ipc.launch_plan import ENDPOINT_BOUND, ROLE_DEVICE, ROLE_VCPU, SECCOMP_KILL, Assignment
from ipc.messages.supervisor import Spawn, Spawned
from jailer.seccomp.install import install, load
from jailer.steps import identity
from tests.guests.build import build
from tests.harness.api import parse_response
from tests.harness.cells import Controller as Cells
from tests.harness.supervisor import StandInSupervisor, run_process
from tests.harness.workers import Walls
from vcpu_worker import main as worker_main
from vmm.api.dispatch import Dispatcher
from vmm.api.http import Request
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.machine.builder import MicrovmBuilder
from vmm.machine.vmm import Vmm
from vmm.session import Session


def real_cells(device_faults: tuple[str, ...], supervisor: StandInSupervisor) -> None:
    """Let the stand-in fork what the real supervisor forks, workers with the filter of a running machine.

    There is no other wall. ``device_faults`` are armed in every device cell.
    """
    chosen = load((ROLE_VCPU,), SECCOMP_KILL).filters[ROLE_VCPU]

    def tighten() -> None:
        identity.set_no_new_privileges()
        install(chosen)

    def spawn(message: Spawn, sequence: int) -> None:
        ours, theirs = descriptors.channel_pair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            supervisor.channel.close()
            theirs.setblocking(False)  # as the supervisor does
            assignment = Assignment(*message)
            if message.role == ROLE_DEVICE:
                faults.arm(device_faults)
                run_process(lambda: os._exit(device_main.run(supervisor.plan, assignment, theirs, Walls())))
            kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            walls = Walls(tightened=tighten)
            run_process(lambda: os._exit(worker_main.run(supervisor.plan, assignment, theirs, kvm, walls)))
        theirs.close()
        descriptors.send(ours, ENDPOINT_BOUND)
        pidfd = os.pidfd_open(pid)
        supervisor.children[pidfd] = (message.worker, pid)
        if message.role == ROLE_DEVICE:
            supervisor.device_cells.add(pid)
        supervisor.channel.send(Spawned(message.worker, pid, message.role), sequence, (pidfd, ours.fileno()))
        ours.close()

    supervisor.handlers[Spawn] = spawn


class Machine:
    """API, controller and a microVM of the real builder."""

    def __init__(self, directory: Path, *, device_faults: tuple[str, ...] = ()) -> None:
        self.cells = Cells(str(directory), supervisor=lambda supervisor: real_cells(device_faults, supervisor))
        self.builder = MicrovmBuilder(self.cells.plan, self.cells.events, self.cells.supervisor)
        self.resources = VmResources(StartOptions(console="none"))
        self.session = Session(self.resources, "standin", self.builder.build, self.cells.events)
        self._dispatcher = Dispatcher(self.session)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """Return the body of a success, the fault message of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        answer = self._dispatcher(Request(method, path, "HTTP/1.1", data))
        assert isinstance(answer, bytes)
        status, reply, _ = parse_response(answer)
        return reply if status < 400 else reply["fault_message"]

    @property
    def vmm(self) -> Vmm:
        assert isinstance(self.session.vmm, Vmm)
        return self.session.vmm

    def start(self) -> None:
        assert self.send("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}) is None
        assert self.send("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))}) is None
        assert self.send("PUT", "/actions", {"action_type": "InstanceStart"}) is None

    def close(self) -> None:
        if self.session.vmm is not None:
            self.vmm.close()
        self.builder.close()
        self.resources.close()
        self.cells.close()
