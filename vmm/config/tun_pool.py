"""The open TUN descriptors that the controller was given: the only way from its empty network to the host's TAPs.

Each belongs to the network namespace that TAPs are taken from, and is attached (TUNSETIFF) to one TAP, once: the kernel
has no way to detach it but to close it.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from ipc.launch_plan import TunDescriptors
from vmm.errors import DeviceError


class TunPool:
    """Owns the descriptors that no network interface has taken yet."""

    def __init__(self, opened: TunDescriptors | None = None) -> None:
        opened = opened or TunDescriptors()
        self._descriptors = list(opened.descriptors)
        self._error = opened.error

    def __len__(self) -> int:
        return len(self._descriptors)

    def take(self) -> int:
        """Hand one over to the caller, not attached yet. Raises DeviceError when there is none."""
        if self._descriptors:
            return self._descriptors.pop()
        raise DeviceError(errno_text(self._error) if self._error else "every TUN descriptor of this microVM was used")

    def close(self) -> None:
        """Close what nobody took."""
        while self._descriptors:
            os.close(self._descriptors.pop())
