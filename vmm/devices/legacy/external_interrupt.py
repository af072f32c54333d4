"""INTR: the line from the 8259s to LINT0 of vCPU 0, which another process runs.

The worker is told by an eventfd that the line has risen. When its vCPU can take an interrupt it asks for the vector
through its exit ring, behind whatever the guest has posted before (docs/smp.md, "The 8259"). It is told once, until it
has asked; the answer says whether the line is still high. Nobody waits for it here, and a worker that never asks, or
asks without having been told, changes nothing but what its own guest sees.
"""

from __future__ import annotations

import os

from ipc.exit_ring import ACKNOWLEDGED, ACKNOWLEDGED_MORE
from ipc.shared_event import raise_event
from vmm.devices.legacy.pic import Pic


class ExternalInterrupt:
    """Owns the eventfd; ``raised`` is for the 8259s, ``acknowledge`` for the ring of vCPU 0."""

    __slots__ = ("_pic", "_told", "eventfd")

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pic: Pic | None = None
        self._told = False

    def connect(self, pic: Pic) -> None:
        """Say whose output this is."""
        self._pic = pic

    def raised(self) -> None:
        """The line has risen."""
        if self._told:
            return
        self._told = True
        raise_event(self.eventfd)

    def acknowledge(self) -> int:
        """Answer the worker: 0 if the line is low, else the vector with ACKNOWLEDGED, and _MORE if it stays high."""
        pic = self._pic
        if pic is None:
            return 0
        self._told = True  # nothing of the cycle itself is news
        pic.settle()
        if not pic.output:
            self._told = False
            return 0
        vector = pic.acknowledge()
        self._told = pic.output
        return vector | ACKNOWLEDGED | (ACKNOWLEDGED_MORE if self._told else 0)

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.eventfd)
