"""INTR of the 8259s, which are in the controller, on its way to LINT0 of vCPU 0 (docs/smp.md, "The 8259").

The controller signals an eventfd when the line rises; the control thread then lets the run loop of vCPU 0 ask for the
vector as soon as the vCPU can take an interrupt. Two workers have the eventfd while one is replaced: only the one that
runs the vCPU may empty it, and whoever begins to, or begins again, asks once without having been told.
"""

from __future__ import annotations

import os
import select

from base.lean_typing import Callable


class ExternalInterrupt:
    """The control thread's end; without an eventfd (a worker that does not run vCPU 0) it does nothing."""

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._risen: Callable[[], None] = lambda: None
        self._listens = False
        #: -1 as long as there is none.
        self.eventfd = -1

    def watch(self, poll: select.poll) -> None:
        """Take what the control thread waits with; before anything else."""
        self._poll = poll

    def attach(self, eventfd: int, risen: Callable[[], None]) -> None:
        """Take the eventfd (-1: there is none); ``risen`` is called when the line may be high."""
        self.eventfd = eventfd
        self._risen = risen

    def listen(self, *, ask: bool) -> None:
        """Watch the line; ``ask``: it may have risen unnoticed. Idempotent."""
        if self.eventfd < 0 or self._poll is None:
            return
        self._poll.register(self.eventfd, select.POLLIN)
        self._listens = True
        if ask:
            self._risen()

    def ignore(self) -> None:
        """Stop watching: another worker is to run the vCPU. Idempotent."""
        if self._listens and self._poll is not None:
            self._poll.unregister(self.eventfd)
            self._listens = False

    def read(self) -> None:
        """The eventfd is ready, or was when it was looked at."""
        if not self._listens:
            return
        try:
            os.read(self.eventfd, 8)
        except BlockingIOError:
            return
        self._risen()
