"""Landlock in every cell: what it stops when it is the only wall, what still works, and what is reported of it.

What a kernel does not offer (docs/adr/landlock.md) is not attacked there: the level is read from it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jailer import landlock
from tests.harness.jail import GID, UID, JailedMicrovm, id_of, is_alive, microvm, wait_for

ABI = landlock.abi()
SCOPES = ["abstract_unix_socket", "signal"] if ABI >= landlock.SCOPE_ABI else []


def _without(*walls: str) -> list[str]:
    return [word for wall in walls for word in ("--without", wall)]


def _outcome(jailed: JailedMicrovm, drill: str) -> str:
    """Return what the attacker reported."""
    pattern = re.compile(rf"^drill {re.escape(drill)}: (.*)$", re.MULTILINE)
    return str(wait_for(lambda: pattern.search(jailed.output()), lambda: f"the drill: {jailed.describe()}")[1])


def _drilled(base: Path, drill: str, *off: str, root_wall: bool = True) -> str:
    """Launch with a drill and walls off; return the outcome."""
    name = drill.partition(":")[2] or drill
    # Without the root wall the default path of the API socket would be the host's.
    arguments = ("--exerciser",) if root_wall else ("--api-sock", "api.socket")
    off = off if root_wall else (*off, "root")
    options = ("--drill", drill, *_without(*off))
    with microvm(base, *options, arguments=arguments, microvm_id=id_of(base, str(len(off)))) as jailed:
        jailed.start()
        return _outcome(jailed, name)


REFUSED = "refused: Permission denied (13)"


@pytest.mark.parametrize("role", ["", "vmm:"])
def test_a_program_is_not_executed(base: Path, role: str) -> None:
    drill = f"{role}run-shell=/bin/sh"
    assert _drilled(base, drill, "seccomp", "landlock", root_wall=False) == "succeeded"
    assert _drilled(base, drill, "seccomp", root_wall=False) == REFUSED


def test_a_worker_opens_no_file(base: Path) -> None:
    assert _drilled(base, "open", "seccomp", "landlock", root_wall=False) == "succeeded (/etc/passwd)"
    assert _drilled(base, "open", "seccomp", root_wall=False) == REFUSED


def test_a_worker_does_not_even_list_its_empty_root(base: Path) -> None:
    assert _drilled(base, "open", "seccomp", "landlock") == "succeeded (/ with ['ipc'])"
    assert _drilled(base, "open", "seccomp") == REFUSED


def test_a_controller_makes_files_and_sockets_only(base: Path) -> None:
    assert _drilled(base, "vmm:make-fifo=/run/fifo", "seccomp", "landlock") == "succeeded (/run/fifo)"
    assert _drilled(base, "vmm:make-fifo=/run/fifo", "seccomp") == REFUSED


@contextmanager
def _bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the cells' uid that has nothing to do with them."""
    with subprocess.Popen(["sleep", "1000"], user=UID, group=GID, extra_groups=[], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("role", ["", "vmm:"])
def test_no_signal_leaves_the_microvm(base: Path, role: str) -> None:
    with _bystander() as bystander:
        drill = f"{role}end={bystander.pid}"
        bare = ("seccomp", "pid-namespace", "cell-identity")
        outcome = _drilled(base, drill, *bare)
        if SCOPES:
            assert outcome == "refused: Operation not permitted (1)"
            assert bystander.poll() is None
            outcome = _drilled(base, drill, *bare, "landlock")
        assert outcome == f"succeeded (process {bystander.pid})"
        assert bystander.wait(30) == -9


def test_the_level_is_reported(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        jailed.wait_cells("supervisor", "vmm", "vcpu 0")
        records = jailed.wall_records()
        levels = {name: record["found"]["landlock"] for name, record in records.items()}
        assert levels == {name: record["asked"]["landlock"] for name, record in records.items()}
        assert set(levels) == {"supervisor", "vmm", "vcpu 0"}
        assert {level["abi"] for level in levels.values()} == {ABI}
        if ABI:
            assert levels["vcpu 0"]["files"] == []
            assert levels["supervisor"]["files"] == ["read_file", "read_dir"]
            assert "execute" not in levels["vmm"]["files"]
            assert levels["vcpu 0"]["scoped"] == levels["vmm"]["scoped"] == SCOPES


def test_switched_off_it_is_reported_as_absent(base: Path) -> None:
    with microvm(base, *_without("landlock")) as jailed:
        jailed.boot()
        jailed.wait_cells("supervisor", "vmm", "vcpu 0")
        assert [record["found"]["landlock"] for record in jailed.wall_records().values()] == [{"abi": 0}] * 3
        assert "switched off: landlock" in jailed.log()


def test_cells_are_still_ended_by_their_supervisor(base: Path) -> None:
    with microvm(base) as jailed:
        cells = jailed.boot().wait_cells("supervisor", "vmm", "vcpu 0")
        jailed.process.kill()  # the death signal, which counts as one of the supervisor
        wait_for(lambda: not any(map(is_alive, cells.values())), jailed.describe)
    with microvm(base, microvm_id=id_of(base, "ended")) as jailed:
        cells = jailed.boot().wait_cells("supervisor", "vmm", "vcpu 0")
        jailed.stop()
        wait_for(lambda: not any(map(is_alive, cells.values())), jailed.describe)
