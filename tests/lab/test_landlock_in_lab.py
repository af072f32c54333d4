"""Landlock and the cells' network on an older kernel (6.1: ABI 2, which knows neither TCP nor scopes)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from ipc.drills.network import FRAME, FRAME_TYPE
from tests.harness.attacks import outcomes
from tests.harness.jail import UID, microvm, namespace, wait_for
from tests.harness.taps import listening, tap

ALL = ("supervisor", "vmm", "vcpu 0")


def test_what_an_older_kernel_has_is_used_and_reported(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        jailed.wait_cells(*ALL)
        for name, record in jailed.wall_records().items():
            level = record["found"]["landlock"]
            assert level == record["asked"]["landlock"], name
            assert (level["abi"], level["tcp"], level["scoped"]) == (2, "open", []), name
        assert "truncate" not in jailed.wall_records()["vmm"]["found"]["landlock"]["files"]


@pytest.mark.parametrize(("off", "expected"), [(("seccomp",), "EACCES"), (("seccomp", "landlock"), "open")])
def test_a_worker_opens_no_file(base: Path, off: tuple[str, ...], expected: str) -> None:
    options = [word for wall in off for word in ("--without", wall)]
    with microvm(base, "--drill", "open", *options) as jailed:
        jailed.start()
        assert wait_for(lambda: outcomes(jailed.output()), jailed.describe)["open"] == expected


def test_an_empty_network_and_a_tap_of_the_callers(base: Path) -> None:
    with ExitStack() as stack:
        name = stack.enter_context(tap(UID))
        packets = stack.enter_context(listening(name, FRAME_TYPE))
        jailed = stack.enter_context(microvm(base, "--drill", f"vmm:tap={name}"))
        cells = jailed.start().wait_up().wait_cells(*ALL)
        assert len({namespace(pid, "net") for pid in cells.values()}) == 1
        assert namespace(cells["vmm"], "net") != namespace("self", "net")
        assert packets.recv(2048) == FRAME
