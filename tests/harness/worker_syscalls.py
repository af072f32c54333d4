"""What a worker asks of the kernel after seal(): ``python -m tests.harness.worker_syscalls``.

It runs a worker through everything it can do, under strace, and prints each system call with the thread that made it
and, for ioctl, the request codes.

docs/seccomp.md is made from its output; the seccomp policy is checked against that page.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ipc.messages.records import Route
from ipc.messages.vm import RoutesSet, SetRoutes
from ipc.messages.worker import DumpCpuConfig, DumpedCpuConfig, Ping, Pong, Resume, SavedState, SaveState
from tests.harness.workers import ChecksCounts, Controller
from vcpu_worker.kvm import abi

#: A system call that nothing else makes marks the moment of sealing.
_CLONE_THREAD = 0x10000
_MARK = "sched_rr_get_interval"
_LINE = re.compile(r"^(\d+) +(?:\[.*?\] )?(?:<\.\.\. )?(\w+)[( ](.*)$")


def seal() -> None:
    """Stands for the jailer's seal: marks the trace."""
    import ctypes

    ctypes.CDLL(None).sched_rr_get_interval(os.getpid(), ctypes.create_string_buffer(64))


def exercise(directory: Path, mode: str, *, number: int = 0, end: str = "finish") -> None:
    """One worker, from Configure to its end."""
    device = ChecksCounts()
    device.record = mode in ("sleeper", "crossing", "ticks")
    with Controller(directory, device, mode=mode, number=number, interrupts=(4,), seal=seal) as worker:
        worker.configure()
        route = Route(4, 0xFEE0_0000, 0x50, False)
        for _ in range(3):
            worker.request(SetRoutes((route,)), RoutesSet)
            worker.resume()
            os.eventfd_write(worker.interrupts[4], 1)
            for _ in range(20):
                worker.request(Ping(), Pong)
            os.kill(worker.pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(worker.pid, signal.SIGCONT)
            worker.request(SetRoutes((route._replace(masked=True),)), RoutesSet)
            worker.pause()
            worker.request(SaveState(0), SavedState)
            worker.request(DumpCpuConfig(0), DumpedCpuConfig)
            if worker.events:
                break
        worker.refused(SaveState(7))
        worker.refused(worker.configuration())
        if worker.events:
            worker.refused(Resume())
        if end == "finish":
            worker.finish()
        else:
            worker.close_descriptor_channel()
            worker.wait_ended()


def main() -> int:
    """Trace ourselves and print the table."""
    if os.environ.get("CELLBLOCK_TRACED"):
        with tempfile.TemporaryDirectory() as directory:
            exercise(Path(directory), "exits", number=10)
            exercise(Path(directory), "storm")
            exercise(Path(directory), "storm", end="gone")
            for mode in ("sleeper", "spin", "crossing", "triple_fault"):
                exercise(Path(directory), mode)
        return 0
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as trace:
        environment = os.environ | {"CELLBLOCK_TRACED": "1"}
        strace = ["strace", "-f", "-X", "raw", "-e", "signal=none", "-o", trace.name]
        subprocess.run([*strace, sys.executable, "-m", "tests.harness.worker_syscalls"], env=environment, check=True)
        report(trace.read().splitlines())
    return 0


def report(lines: list[str]) -> None:
    """Print the calls of all sealed processes: name, how often, in how many kinds of thread, ioctl requests."""
    process_of: dict[str, str] = {}
    flags_of: dict[str, int] = {}
    sealed: set[str] = set()
    calls: collections.Counter[str] = collections.Counter()
    requests: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        thread, name, rest = match.groups()
        if name in ("clone", "clone3", "fork", "vfork"):
            flags = re.search(r"flags=(0x[0-9a-f]+)", rest)
            if flags:
                flags_of[thread] = int(flags.group(1), 16)
            child = re.search(r"= (\d+)$", rest)
            if child:
                same = flags_of.get(thread, 0) & _CLONE_THREAD
                process_of[child.group(1)] = process_of.get(thread, thread) if same else child.group(1)
        process = process_of.get(thread, thread)
        if name == _MARK:
            sealed.add(process)
        elif process in sealed and "resumed>" not in rest:
            calls[name] += 1
            examples.setdefault(name, rest[:100])
            if name == "ioctl":
                code = re.match(r"\d+, (0x[0-9a-f]+)", rest)
                requests[abi.request_name(int(code.group(1), 16)) if code else rest[:40]] += 1
    for name, count in sorted(calls.items()):
        print(f"{name:20} {count:8}  {examples[name]}")
    print()
    for name, count in sorted(requests.items()):
        print(f"{name:28} {count:8}")


if __name__ == "__main__":
    sys.exit(main())
