"""Entry point of a device cell: from the fork to the exit code."""

from __future__ import annotations

import os
import sys

import zmq

from base import faults
from base.errors import CellblockError
from base.exit_codes import CELL_OUT_OF_MEMORY, GENERIC_ERROR
from base.lean_std import socket
from base.threads import ZEROMQ_THREADS, MadeByLibrary
from device_cell.serve import Control, serve
from ipc.channel import Channel, PairChannel, await_endpoint, await_welcome
from ipc.launch_plan import ROLE_DEVICE, Assignment, LaunchPlan, Seal, endpoint
from ipc.messages.device import DEVICE, DEVICE_DESCRIPTORS, Hello, Welcome

#: How long the last message may take to leave the process.
_LINGER_MS = 200


class _Start:
    """Whether the start is over: what goes wrong later is not a start that failed."""

    over = False


def run(plan: LaunchPlan, assignment: Assignment, channel: socket.socket, seal: Seal) -> int:
    """Be the device cell ``assignment`` until the controller says Finish or is gone; return the exit code of the cell.

    ``channel`` is our end of the descriptor channel, non-blocking; it is taken over. Nothing that another cell sent is
    read before the walls are verified; they are tightened when the devices are made, before a driver is served. What
    goes wrong until the cell is welcomed is raised, for the supervisor to tell; afterwards no exception leaves this.
    """
    start = _Start()
    try:
        return _run(plan, assignment, channel, seal, start)
    except MemoryError:
        if not start.over:
            raise
        return _complain("its limit of memory is reached", CELL_OUT_OF_MEMORY)
    except Exception as error:
        if not start.over:
            raise
        expected = isinstance(error, CellblockError)
        return _complain(str(error) if expected else f"internal error: {type(error).__name__}: {error}", GENERIC_ERROR)


def _complain(text: str, code: int) -> int:
    os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    return code


def _run(plan: LaunchPlan, assignment: Assignment, channel: socket.socket, seal: Seal, start: _Start) -> int:
    context = zmq.Context(io_threads=1)
    with MadeByLibrary(ZEROMQ_THREADS):
        control_channel = Channel(context, DEVICE, plan.epoch)
    seal.await_verified()
    await_endpoint(channel)
    control_channel.connect(endpoint(plan.worker_ipc_directory, ROLE_DEVICE, assignment.worker))
    faults.visit("device.hello")
    control_channel.send(Hello(assignment.worker, os.getpid()))
    await_welcome(control_channel, Welcome)
    start.over = True
    _run_drills(plan, ROLE_DEVICE)
    control = Control(control_channel, PairChannel(channel, DEVICE_DESCRIPTORS, plan.epoch), seal, plan.boot_id)
    code = serve(control, channel.fileno())
    control_channel.close(_LINGER_MS)
    context.term()
    return code


def _run_drills(plan: LaunchPlan, role: str) -> None:
    """Attack our own walls if the jailer armed a drill (ipc.drills, imported by the template only then)."""
    drills = sys.modules.get("ipc.drills")
    if drills is not None:
        drills.run(plan.drills, role)
