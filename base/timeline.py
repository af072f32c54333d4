"""When each step of a start happened, in all cells, on one clock: what `bench/startup.py` itemises.

Off unless the program is started with CELLBLOCK_TIMELINE=1 in its environment; then :func:`mark` appends to an area
of its own cell in one shared mapping, made before the first fork, and the supervisor logs everything at the end.
Every fault point (base.faults) is a mark too.
"""

from __future__ import annotations

import mmap
import os
import time

VARIABLE = "CELLBLOCK_TIMELINE"
#: The cells that have an area: supervisor, controller, workers.
AREAS = 2 + 4
_AREA_SIZE = mmap.PAGESIZE

_areas: mmap.mmap | None = None
_cell = 0
_offset = 0


def start_if_asked() -> None:
    """Begin to record if the environment asks for it. Called once, as early as possible."""
    global _areas
    if os.environ.get(VARIABLE) == "1":
        _areas = mmap.mmap(-1, AREAS * _AREA_SIZE)  # shared with every fork
        mark("program")


def enter(cell: int) -> None:
    """Say which cell this is from now on: 0 supervisor, 1 controller, 2 … workers. Further ones record nothing."""
    global _cell, _offset, _areas
    _cell, _offset = cell, 0
    if cell >= AREAS:
        _areas = None


def mark(step: str) -> None:
    """Record that ``step`` begins now. Costs a comparison when nothing is recorded."""
    global _offset
    if _areas is None:
        return
    line = f"{step} {time.monotonic_ns()} {time.process_time_ns()}\n".encode()
    if _offset + len(line) <= _AREA_SIZE:
        start = _cell * _AREA_SIZE + _offset
        _areas[start : start + len(line)] = line
        _offset += len(line)


def collected() -> list[tuple[int, str, int, int]]:
    """Return all marks in order of time: cell, step, CLOCK_MONOTONIC and the cell's CPU time in nanoseconds."""
    marks = []
    if _areas is not None:
        for cell in range(AREAS):
            area = _areas[cell * _AREA_SIZE : (cell + 1) * _AREA_SIZE].rstrip(b"\0").decode()
            for line in area.splitlines():
                step, moment, cpu = line.rsplit(" ", 2)
                marks.append((cell, step, int(moment), int(cpu)))
    return sorted(marks, key=lambda each: each[2])
