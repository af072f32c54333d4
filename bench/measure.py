"""What the benchmarks share: starting programs at a known moment, CPU time of whole process trees, tables."""

from __future__ import annotations

import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

_CGROUP_V1 = Path("/sys/fs/cgroup/cpuacct")
_CGROUP_V2 = Path("/sys/fs/cgroup")
_NANOSECONDS_PER_MS = 1e6
TIMEOUT = 60.0


class BenchError(Exception):
    """A measured program did not do what it should; the text holds what it printed last."""


class CpuAccount:
    """CPU time of everything that was started in it: a control group of its own, the one clock that forgets nobody."""

    def __init__(self) -> None:
        name = f"cellblock-bench-{os.getpid()}"
        if (_CGROUP_V2 / "cgroup.controllers").exists():
            self._folder, self._file, self._unit = _CGROUP_V2 / name, "cpu.stat", 1e3
        elif _CGROUP_V1.is_dir():
            self._folder, self._file, self._unit = _CGROUP_V1 / name, "cpuacct.usage", _NANOSECONDS_PER_MS
        else:
            raise BenchError("no control group that counts CPU time: mount cgroup2 or cpuacct")
        self._folder.mkdir(exist_ok=True)

    def join(self) -> None:
        """Count the calling process and its children from now on."""
        (self._folder / "cgroup.procs").write_text("0")

    def read(self) -> float:
        """Return the CPU time used so far in milliseconds."""
        text = (self._folder / self._file).read_text()
        if self._file == "cpu.stat":
            text = next(line for line in text.splitlines() if line.startswith("usage_usec")).split()[1]
        return int(text) / self._unit

    def close(self) -> None:
        """Remove the group; its processes must have ended."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def __enter__(self) -> CpuAccount:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pipes:
    """Standard input (empty), output and error of a measured program, as pipes that this process reads."""

    def __init__(self) -> None:
        self.theirs = [os.open("/dev/null", os.O_RDONLY)]
        ends = [os.pipe(), os.pipe()]
        self.theirs += [write for _, write in ends]
        self._output, self._errors = (read for read, _ in ends)
        self.output = b""
        for each in (self._output, self._errors):
            os.set_blocking(each, False)

    def started(self) -> None:
        """The program has its ends: close ours of them."""
        for each in self.theirs:
            os.close(each)
        self.theirs = []

    def wait_for(self, wanted: bytes) -> float:
        """Return when (time.monotonic) the wanted bytes were read on standard output."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        moment = time.monotonic()
        deadline = moment + TIMEOUT
        while wanted not in self.output:
            ready = poll.poll(max(0.0, deadline - moment) * 1e3)
            part = os.read(self._output, 65536) if ready else b""
            moment = time.monotonic()
            if not part:
                raise BenchError(f"{wanted!r} did not come; the program printed:\n{self.tail()}")
            self.output += part
        return moment

    def errors(self) -> str:
        """Return what came on standard error until its end."""
        os.set_blocking(self._errors, True)
        parts = []
        while part := os.read(self._errors, 65536):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def tail(self) -> str:
        """Return the last of both outputs, for error messages."""
        errors = b""
        try:
            errors = os.read(self._errors, 65536)
        except BlockingIOError:
            pass
        return (self.output[-2000:] + errors[-2000:]).decode(errors="replace")

    def close(self) -> None:
        """Close everything."""
        self.started()
        os.close(self._output)
        os.close(self._errors)


class Started:
    """A program that was started; ``start`` is the moment of its execve (time.monotonic), ``cpu`` the account then."""

    def __init__(self, pid: int, pipes: Pipes, start: float, cpu: float, account: CpuAccount) -> None:
        self.pid = pid
        self.pipes = pipes
        self.start = start
        self._cpu = cpu
        self._account = account

    def spent(self, moment: float) -> tuple[float, float]:
        """Return milliseconds from the start to ``moment``, and CPU milliseconds used until now."""
        return (moment - self.start) * 1e3, self._account.read() - self._cpu

    def end(self, how: int = signal.SIGTERM) -> str:
        """End the program, wait for it; return its standard error."""
        try:
            os.kill(self.pid, how)
        except ProcessLookupError:
            pass
        self._wait()
        errors = self.pipes.errors()
        self.pipes.close()
        return errors

    def _wait(self) -> None:
        os.waitpid(self.pid, 0)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.end(signal.SIGKILL)


def start(command: Sequence[str], account: CpuAccount, environment: Mapping[str, str] | None = None) -> Started:
    """Start a program. The process that executes it is forked and waits before the clock starts."""
    pipes = Pipes()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            account.join()
            os.close(write_end)
            for number, descriptor in enumerate(pipes.theirs):
                os.dup2(descriptor, number)
            os.read(read_end, 1)
            os.execve(command[0], list(command), {**os.environ, **(environment or {})})
        finally:
            os._exit(127)
    pipes.started()
    os.close(read_end)
    time.sleep(0.01)  # until it waits
    cpu = account.read()
    moment = time.monotonic()
    os.write(write_end, b"1")
    os.close(write_end)
    return Started(pid, pipes, moment, cpu, account)


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Describe measured values: median and, in brackets, the quartiles (of three and fewer: all that there is)."""
    if len(values) < 4:
        low, middle, high = min(values), median(values), max(values)
    else:
        low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], write: Callable[[str], object] | None = None) -> None:
    """Print rows with aligned columns; the first column is left-aligned, the others are right-aligned."""
    put = write or (lambda line: sys.stdout.write(line + "\n"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        put("  ".join(cells).rstrip())
    sys.stdout.flush()


def verdict(name: str, value: float, limit: float) -> str:
    """Say whether an aim was reached."""
    return f"{'reached' if value <= limit else 'MISSED '}  {name}: {value:.2f}, aim at most {limit:g}"
