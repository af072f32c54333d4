"""Fuzzers in processes of their own: limits of address space and of time per example; what became of the examples."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from devtool.project import PYTHON, ROOT

ADDRESS_SPACE = 512 << 20
SECONDS_PER_EXAMPLE = 1.0
#: Examples of a target in a soak.
FULL = 20_000


class TookTooLongError(Exception):
    """An example used more than a second of CPU time."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLongError


def limit(*, address_space: bool = True) -> None:
    """Limit this process: its address space, and the time of what is under :func:`example`."""
    if address_space:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGPROF, _too_long)


@contextmanager
def example(outcomes: Counter[str]) -> Iterator[None]:
    """Count one example and limit its time."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_EXAMPLE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcomes["examples"] += 1


def run(fuzzer: str, target: str, seed: int, count: int, *arguments: str, counted: str = "examples") -> dict[str, int]:
    """Run examples of a target of one of the fuzzers in tests/fuzz; return what became of them."""
    command = [str(PYTHON), "-m", f"tests.fuzz.{fuzzer}", target, str(seed), str(count), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{target}, seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes: dict[str, int] = json.loads(done.stdout)
    assert outcomes[counted] >= count
    return outcomes
