"""`./dev bench pages`: which memory each cell has for itself, by kind; `--record` renews jailer/hot/functions.txt.

Recording starts a microVM by a configuration file and one by the API, notes every function that each cell calls from
its fork on, and lists them: those of several cells first, then cell by cell, in the order of their first call.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.measure import CpuAccount, Started, median, start, table
from bench.startup import Bench
from devtool.bytecode import HOT_FUNCTIONS
from devtool.project import PYTHON, ROOT, VENV

ROUNDS = 3
_AREA_SIZE = 1 << 20
CELLS = ("supervisor", "vmm", "vcpu 0")

KINDS = ("interpreter's data", "small objects", "malloc", "libraries' data", "stacks", "other")


def kind_of(path: str) -> str:
    """Say what a private mapping of a cell holds, by its path in /proc/PID/smaps."""
    name = path.rpartition("/")[2]
    if name.startswith("python"):
        return "interpreter's data"
    if path == "[heap]":
        return "malloc"
    if path.startswith("[stack"):
        return "stacks"
    if ".so" in name:
        return "libraries' data"
    return "small objects" if not path else "other"


def private_dirty(pid: int) -> Counter[str]:
    """Return the private dirty memory of a process in KiB, by kind. Threads' stacks count as small objects."""
    found: Counter[str] = Counter()
    path = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            path = words[5] if len(words) > 5 else ""
        elif words[0] == "Private_Dirty:":
            found[kind_of(path)] += int(words[1])
    return found


def measure(bench: Bench) -> dict[str, Counter[str]]:
    """Start a jailed microVM; return what each cell has for itself when the guest sleeps."""
    return bench.settled(private_dirty)


def report(runs: list[dict[str, Counter[str]]]) -> None:
    """Print the medians."""
    rows = [[cell, *(f"{median([run[cell][kind] for run in runs]):.0f}" for kind in KINDS), ""] for cell in runs[0]]
    for row, cell in zip(rows, runs[0], strict=True):
        row[-1] = f"{median([run[cell].total() for run in runs]):.0f}"
    table(("private dirty, KiB", *KINDS, "sum"), rows)


# ---------------------------------------------------------------- record

_RECORDER = """
import mmap, os, sys
sys.path[:0] = {paths!r}
file = os.open({file!r}, os.O_RDWR | os.O_CLOEXEC)
area = mmap.mmap(file, {size} * 4)
os.close(file)
seen, at = set(), 0
def note(frame, event, _):
    global at
    if event == "call" and frame.f_code not in seen:
        seen.add(frame.f_code)
        line = (frame.f_globals.get("__name__", "") + ":" + frame.f_code.co_qualname + "\\n").encode()
        area[at : at + len(line)] = line
        at += len(line)
def enter(cell):
    global at
    seen.clear()
    at = min(cell, 3) * {size}
    sys.setprofile(note)
from base import lean_msgpack, lean_zmq, timeline
lean_zmq.install()
lean_msgpack.install()
from jailer import main, template
from vcpu_worker import vcpu_thread
timeline.enter = enter
warm, run = template.warm, vcpu_thread.VcpuThread._main
def warm_and_note():
    warm()
    enter(0)
def run_and_note(self):
    sys.setprofile(note)
    run(self)
template.warm, vcpu_thread.VcpuThread._main = warm_and_note, run_and_note
sys.exit(main.main(sys.argv))
"""


def _record(folder: Path, account: CpuAccount, run: Callable[[Bench], object]) -> list[list[str]]:
    """Run one case with the recorder in the place of ``jailer``; return the functions of each cell."""
    file = folder / "calls"
    file.write_bytes(bytes(4 * _AREA_SIZE))
    paths = [str(ROOT), *(str(path) for path in (VENV / "lib").glob("python3.*/site-packages"))]
    code = _RECORDER.format(paths=paths, file=str(file), size=_AREA_SIZE)

    class Recorded(Bench):
        def cold(self, program: str, arguments: list[str]) -> Started:
            assert program == "jailer"
            return start([str(PYTHON), "-IS", "-c", code, *arguments], account)

    run(Recorded(folder, account))
    content = file.read_bytes()
    areas = [content[cell * _AREA_SIZE : (cell + 1) * _AREA_SIZE].rstrip(b"\0").decode() for cell in range(len(CELLS))]
    return [area.splitlines() for area in areas]


def in_order(cells: list[list[str]]) -> list[str]:
    """Return every function once: those of several cells first, then cell by cell."""
    count = Counter(name for cell in cells for name in set(cell))
    wanted = [
        name
        for cell in cells
        for name in cell
        if not name.startswith(("__main__:", ":")) and "<" not in name and name.count(":") == 1
    ]
    return list(dict.fromkeys(sorted(wanted, key=lambda name: count[name] < 2)))


def record(folder: Path, account: CpuAccount) -> None:
    """Renew the list of hot functions."""
    cases = (lambda bench: bench.jailer_first(bench.cold), Bench.instance_start)
    runs = [_record(folder, account, case) for case in cases]
    merged = [list(dict.fromkeys(name for run in runs for name in run[cell])) for cell in range(len(CELLS))]
    functions = in_order(merged)
    HOT_FUNCTIONS.write_text("".join(f"{name}\n" for name in functions))
    sys.stdout.write(f"{HOT_FUNCTIONS.relative_to(ROOT)}: {len(functions)} functions\n")


def main() -> int:
    """Measure and print, or record; exit status 0."""
    parser = argparse.ArgumentParser(prog="./dev bench pages", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write which functions the cells call, instead")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cellblock-bench-"))
    try:
        with CpuAccount() as account:
            if options.record:
                record(folder, account)
                return 0
            runs = [measure(Bench(folder, account)) for _ in range(ROUNDS)]
        report(runs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
