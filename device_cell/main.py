"""Entry point of a device cell: from the fork to the exit code."""

from __future__ import annotations

import select

from base.lean_std import socket
from ipc.descriptors import receive
from ipc.errors import ChannelError, DescriptorError
from ipc.launch_plan import ENDPOINT_BOUND, Assignment, LaunchPlan, Seal


def run(_plan: LaunchPlan, _assignment: Assignment, channel: socket.socket, seal: Seal) -> int:
    """Be the device cell of this assignment until the controller is gone; return the exit code of the cell.

    ``channel`` is our end of the descriptor channel, non-blocking, and is taken over. Nothing that another cell sent is
    read before the walls are verified. Raises ChannelError, DescriptorError.
    """
    seal.await_verified()
    _wait_readable(channel)
    frame, owned = receive(channel, maximum_size=len(ENDPOINT_BOUND))
    owned.close()
    if frame != ENDPOINT_BOUND:
        raise ChannelError("nobody wants this device cell")
    seal.tighten()
    seal.await_tightened()
    while True:
        _wait_readable(channel)
        try:
            _, owned = receive(channel)
        except DescriptorError:
            return 0  # the controller has closed its end
        owned.close()


def _wait_readable(channel: socket.socket) -> None:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.poll()
