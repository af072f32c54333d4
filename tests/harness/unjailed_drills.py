"""The program ``firecracker`` whose cells attack right away: ``unjailed_drills.py ROOT SWITCHES DRILL…``.

``SWITCHES`` are names of walls to switch off, separated by commas. Both cells carry out the drills that name their role
(``vcpu:kill=PID``, ``vmm:kill=supervisor``) when they are sealed, then the controller waits for its end.
"""

from __future__ import annotations

import os
import sys

ROOT, switches, *specifications = sys.argv[1:]
sys.path[:0] = [ROOT, os.path.join(ROOT, ".venv/lib/python3.11/site-packages")]

import socket  # noqa: E402

from ipc import drills  # noqa: E402
from ipc.channel import PairChannel  # noqa: E402
from ipc.launch_plan import ENDPOINT_BOUND, FORKED_AHEAD, Assignment, LaunchPlan, Seal  # noqa: E402
from ipc.messages.supervisor import SUPERVISOR, Spawn  # noqa: E402
from jailer import cli, direct, plan, template  # noqa: E402
from jailer.errors import JailerError  # noqa: E402


def vmm(launch: LaunchPlan, channel: socket.socket, seal: Seal) -> int:
    seal.tighten()
    pair = PairChannel(channel, SUPERVISOR, launch.epoch)
    pair.send(Spawn(*FORKED_AHEAD))
    drills.run(tuple(specifications), "vmm")
    while True:
        _, owned = pair.receive(4)
        owned.close()


def vcpu(launch: LaunchPlan, assignment: Assignment, channel: socket.socket, kvm_fd: int, seal: Seal) -> int:
    seal.await_verified()
    channel.setblocking(True)
    assert channel.recv(16) == ENDPOINT_BOUND
    seal.tighten()
    drills.run(tuple(specifications), "vcpu")
    channel.recv(1)
    return 0


def main() -> int:
    off = frozenset(switches.split(",")) - {""}
    roles = template.Roles(vmm, vcpu, FORKED_AHEAD)
    try:
        return direct.launch((), "drills", plan.started_now(), lambda: roles, off=off)
    except JailerError as error:
        cli.print_error(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
