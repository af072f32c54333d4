"""`./dev bench api`: requests per second and latency of the API, start → API ready, and what `--version` costs.

Every round measures each case once, one after the other; ratios are formed within a round. The baseline of requests is
a bare Python server on a UNIX socket that answers whatever comes with as many bytes, that of programs the interpreter
that does nothing. docs/benchmarks.md says what each figure means.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.measure import BenchError, CpuAccount, median, spread, table, verdict
from bench.startup import Bench, Sample
from devtool.project import LAUNCHERS
from lab.client import launch_unjailed

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
KEPT, FRESH = "kept connection", "fresh connection"
NOTHING = "python -I -S -c pass"
VERSION = "firecracker --version"
JAILER_VERSION = "jailer --version"
VERSION_AIM = 1.5
DIRECT_READY = "firecracker: start → API ready, cold"
JAILER_READY = "jailer: start → API ready, cold"


class Latencies:
    """Latencies of one round in microseconds."""

    def __init__(self, values: list[float]) -> None:
        values.sort()
        self.median = median(values)
        self.p99 = values[int(len(values) * 0.99)]
        self.per_second = 1e6 * len(values) / sum(values)


def kept(path: Path, count: int, length: int) -> Latencies:
    """Send requests one after the other on one connection; ``length`` is that of each answer."""
    values = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        for _ in range(count):
            begun = time.perf_counter()
            connection.sendall(REQUEST)
            _take(connection, length)
            values.append((time.perf_counter() - begun) * 1e6)
    return Latencies(values)


def fresh(path: Path, count: int, length: int) -> Latencies:
    """Send each request on a connection of its own: connect, ask, take the answer, close."""
    values = []
    for _ in range(count):
        begun = time.perf_counter()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(REQUEST)
            _take(connection, length)
        values.append((time.perf_counter() - begun) * 1e6)
    return Latencies(values)


def _take(connection: socket.socket, length: int) -> None:
    rest = length
    while rest:
        part = connection.recv(65536)
        if not part:
            raise BenchError("the server has closed the connection")
        rest -= len(part)


def answer_length(path: Path) -> int:
    """Return the length of the answer to the request, head and body."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(REQUEST)
        return len(connection.recv(65536))


@contextmanager
def bare_server(path: Path, length: int) -> Iterator[None]:
    """A process that answers on a UNIX socket, one connection after the other, with as little as there can be."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        pid = os.fork()
        if pid == 0:
            answer = b"x" * length
            while True:
                connection, _ = listener.accept()
                while connection.recv(4096):
                    connection.sendall(answer)
                connection.close()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        path.unlink()


def run_program(command: list[str]) -> Sample:
    """Run a program to its end; milliseconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={})
    wall = (time.perf_counter() - begun) * 1e3
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(wall, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3)


def _report_requests(rounds: dict[str, list[Latencies]]) -> None:
    rows = []
    for kind in (KEPT, FRESH):
        ours, bare = rounds[f"API, {kind}"], rounds[f"bare server, {kind}"]
        for name, measured in ((f"GET /, {kind}", ours), (f"bare Python server, {kind}", bare)):
            ratio = median([mine.median / theirs.median for mine, theirs in zip(measured, bare, strict=True)])
            rows.append(
                [
                    name,
                    spread([each.median for each in measured]),
                    spread([each.p99 for each in measured]),
                    f"{median([each.per_second for each in measured]):,.0f}",
                    f"{ratio:.2f}",
                ]
            )
    table(("medians of rounds (quartiles)", "median us", "99th percentile us", "per second", "/ bare"), rows)


def _report_programs(samples: dict[str, list[Sample]]) -> dict[str, float]:
    baseline = samples[NOTHING]
    rows, ratios = [], {}
    for name, measured in samples.items():
        ratio = median([mine.wall / base.wall for mine, base in zip(measured, baseline, strict=True)])
        ratios[name] = ratio
        cpu = median([mine.cpu / base.cpu for mine, base in zip(measured, baseline, strict=True)])
        wall_ms, cpu_ms = (spread([each[column] for each in measured]) for column in (0, 1))
        rows.append([name, wall_ms, cpu_ms, f"{ratio:.2f}", f"{cpu:.2f}"])
    table(("medians (quartiles)", "wall ms", "CPU ms", f"wall / {NOTHING}", "CPU"), rows)
    return ratios


def main() -> int:
    """Measure and print; exit status 0 whether the aims are reached or not."""
    parser = argparse.ArgumentParser(prog="./dev bench api", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=1000, help="per case and round; default: %(default)s")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cellblock-bench-"))
    programs: dict[str, list[str]] = {
        NOTHING: ["/usr/bin/python3", "-I", "-S", "-c", "pass"],
        VERSION: [str(LAUNCHERS / "firecracker"), "--version"],
        JAILER_VERSION: [str(LAUNCHERS / "jailer"), "--version"],
    }
    requests: dict[str, list[Latencies]] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in (*programs, DIRECT_READY, JAILER_READY)}
    try:
        bare = folder / "bare.socket"
        with CpuAccount() as account, launch_unjailed(folder, ["--level", "Warn"]) as vm:
            vm.wait_for_api()
            length = answer_length(vm.api_socket)
            bench = Bench(folder, account)
            cases: dict[str, Callable[[], Latencies]] = {}
            for kind, ask in ((KEPT, kept), (FRESH, fresh)):
                cases[f"API, {kind}"] = lambda ask=ask: ask(vm.api_socket, options.requests, length)  # type: ignore[misc]
                cases[f"bare server, {kind}"] = lambda ask=ask: ask(bare, options.requests, length)  # type: ignore[misc]
            starts = {DIRECT_READY: bench.direct_api, JAILER_READY: bench.jailer_api}
            with bare_server(bare, length):
                for number in range(options.rounds + 1):  # the first round fills caches
                    for name, case in cases.items():
                        latencies = case()
                        if number:
                            requests.setdefault(name, []).append(latencies)
                    for name, command in programs.items():
                        sample = run_program(command)
                        if number:
                            samples[name].append(sample)
                    for name, start in starts.items():
                        sample = start(bench.cold)
                        if number:
                            samples[name].append(sample)
            vm.process.terminate()
            vm.wait()
        _report_requests(requests)
        print()
        ratios = _report_programs(samples)
        print()
        for name in (VERSION, JAILER_VERSION):
            print(verdict(f"{name} / {NOTHING}", ratios[name], VERSION_AIM))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
