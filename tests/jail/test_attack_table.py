"""The attack suite: every attempt of ipc/drills/ in every kind of cell, and what it comes to (tests/attack_table.py).

Most run one after the other in one launch in which the filter answers with an errno instead of ending the cell: its
program is the same but for that. A sample, and all of them in the soak "attacks", is ended for real.
"""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.attack_table import ENDS
from tests.harness.attacks import (
    BARE,
    CELLS,
    FILTER,
    GUARDED,
    arguments,
    attempts,
    differences,
    launch,
    outcomes,
    row,
    run,
)
from tests.harness.jail import id_of, wait_for
from tests.harness.run_options import Scale

#: How the end of a cell looks in the log, and the cell's name there.
_ENDED = r"\(pid \d+\): wall seccomp: ended by the filter for a forbidden system call"
NAMES = {"vcpu": "vcpu 0", "vmm": "vmm", "device": "device 0", "device-running": "device 0"}
#: One of a kind, for each way in which a filter decides: no rule, arguments, the process, the request code.
SAMPLE = ("chroot", "executable-mprotect", "tgkill", "kvm-create-device", "clone", "prctl-tracer", "unknown-call")


@pytest.mark.parametrize("cell", CELLS)
def test_every_attempt_with_every_wall_on(base: Path, cell: str) -> None:
    seen = run(base, cell, attempts(cell, filtered=True), *GUARDED)
    assert not (wrong := differences(cell, seen, filtered=True)), "\n".join(wrong)


@pytest.mark.parametrize("cell", CELLS)
def test_every_attempt_without_the_filter_alone(base: Path, cell: str) -> None:
    seen = run(base, cell, attempts(cell, filtered=False), *BARE)
    assert not (wrong := differences(cell, seen, filtered=False)), "\n".join(wrong)


def _ends_the_cell(base: Path, cell: str, attempt: str, *options: str) -> None:
    """Let a cell make an attempt that its filter forbids; fails unless it is ended for it, before it was done."""
    name = id_of(base, f"{cell}-{attempt}")
    with launch(base, cell, *arguments(cell, [attempt]), *options, microvm_id=name) as jailed:
        jailed.start()
        if cell == "supervisor":
            assert jailed.process.wait(60) == -signal.SIGSYS, (attempt, jailed.describe())
        else:
            pattern = rf"{NAMES[cell]} {_ENDED}"
            wait_for(lambda: re.search(pattern, jailed.log()), lambda: f"{attempt}: {jailed.describe()}")
        assert attempt not in outcomes(jailed.output())


@pytest.mark.soak("attacks")
@pytest.mark.parametrize("cell", CELLS)
def test_the_filter_ends_whoever_tries(base: Path, cell: str, scale: Scale) -> None:
    all_of_them = [name for name in attempts(cell, filtered=True) if row(name, cell).guarded == FILTER]
    chosen = [name for name in scale(list(SAMPLE), all_of_them) if row(name, cell).guarded == FILTER]
    assert len(chosen) >= len(SAMPLE) - 1
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: _ends_the_cell(base, cell, name), chosen))


@pytest.mark.parametrize("mode", ["kill", GUARDED[1]])
@pytest.mark.parametrize("attempt", sorted(ENDS))
@pytest.mark.parametrize("cell", CELLS)
def test_calls_of_other_kinds_end_the_cell_in_every_mode(base: Path, cell: str, attempt: str, mode: str) -> None:
    assert row(attempt, cell).guarded == "ends"
    _ends_the_cell(base, cell, attempt, "--seccomp-mode", mode)
