"""What the control group of a jailed microVM counts: memory at its peak, and processes and threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.measure import TIMEOUT, BenchError

MIB = 1 << 20
#: Where nobody else makes a control group.
PARENT = f"cellblock-bench-memory-{os.getpid()}"


class ControlGroup:
    """Where the control group of a jailed microVM is, and what it counts."""

    def __init__(self, microvm_id: str) -> None:
        self.version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
        below = Path(PARENT) / microvm_id
        root = Path("/sys/fs/cgroup")
        self._memory, self._pids = (root / below,) * 2 if self.version == 2 else (
            root / "memory" / below, root / "pids" / below,
        )  # fmt: skip

    def options(self, tasks: int = 4000, descriptors: int = 4000) -> list[str]:
        """Return the jailer's flags for a microVM that is counted, under limits of tasks and descriptors."""
        everything = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        return [
            "--cleanup", "--parent-cgroup", PARENT, "--cgroup-version", str(self.version),
            "--cgroup", f"{everything}={64 << 30}", "--cgroup", f"pids.max={tasks}",
            "--resource-limit", f"no-file={descriptors}",
        ]  # fmt: skip

    def wait_removed(self) -> None:
        """Wait for the janitor. Raises BenchError."""
        deadline = time.monotonic() + TIMEOUT
        while self._memory.parent.exists() or self._pids.parent.exists():
            if time.monotonic() > deadline:
                raise BenchError(f"the janitor has not removed {PARENT}")
            time.sleep(0.01)

    def peak(self) -> int:
        """Return the most memory that was charged at one time, in bytes."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self._memory / name).read_text())

    def part(self, name: str) -> int:
        """Return a part of what is charged now (memory.stat), in bytes; 0 if this kernel does not tell it."""
        for line in (self._memory / "memory.stat").read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
        return 0

    def kernel(self) -> int:
        """Return the kernel's memory that is charged now, in bytes."""
        if self.version == 2:
            return self.part("kernel")
        return int((self._memory / "memory.kmem.usage_in_bytes").read_text())

    def tasks(self) -> int:
        """Return how many processes and threads there are."""
        return int((self._pids / "pids.current").read_text())
