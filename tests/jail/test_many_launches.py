"""Many launches and ends, several at a time: nothing is left of any, and the last ones are as fast as the first."""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.jail import JailedMicrovm, id_of, wait_for
from tests.harness.jail_left import janitors, remove_shared_parents
from tests.harness.leftovers import Leftovers
from tests.harness.run_options import NoLeftovers, Scale


def _live(base: Path, number: int) -> float:
    """Launch, wait for the API, end; return the seconds from the start of the program to the first answer."""
    jailed = JailedMicrovm(base, "--cleanup", "--cgroup", "pids.max=50", microvm_id=id_of(base, str(number)))
    began = time.monotonic()
    try:
        jailed.start()
        jailed.wait_up()
        seconds = time.monotonic() - began
        jailed.stop()
    finally:
        jailed.destroy()
    return seconds


def _network_namespaces() -> set[str]:
    """Return the network namespaces that a mount or a descriptor of this process holds, beyond those of processes."""
    mounted = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - nsfs " in line]
    return {*mounted, *(os.readlink(each) for each in Path("/proc/self/fd").iterdir() if os.path.lexists(each))}


@pytest.mark.soak("launch")
def test_many_launches_leave_nothing_and_stay_as_fast(base: Path, scale: Scale, no_leftovers: NoLeftovers) -> None:
    count, together, part = scale((24, 6, 6), (500, 20, 100))
    before = _network_namespaces()
    open_before = len(os.listdir("/proc/self/fd"))
    with no_leftovers(base, names=(id_of(base),)) as leftovers:
        assert isinstance(leftovers, Leftovers)
        with ThreadPoolExecutor(together) as pool:
            seconds = list(pool.map(lambda number: _live(base, number), range(count)))
        wait_for(lambda: not janitors(base), "the janitors")
        remove_shared_parents(base)
    first, last = (statistics.median(each) for each in (seconds[:part], seconds[-part:]))
    print(
        f"{count} launches, {together} at a time: median of the first {part} {first * 1000:.0f} ms, "
        f"of the last {part} {last * 1000:.0f} ms, ratio {last / first:.2f}"
    )
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert len(_network_namespaces()) == len(before)
    if count == 500:  # a soak has the machine for itself
        assert last < 1.5 * first
