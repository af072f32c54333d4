"""Signals to other processes from inside a cell: each succeeds with the walls off and is refused by each wall alone.

Attacks by tgkill(2) of jailed workers are in test_attacks.py; here are those by descriptors of processes, those of
controllers, and those without a jail as root, where every process of the host is of the attacker's user.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devtool.project import PYTHON, ROOT
from jailer import landlock
from tests.harness.jail import GID, UID, JailedMicrovm, id_of, microvm, wait_for

PROGRAM = Path(__file__).resolve().parent.parent / "harness" / "unjailed_drills.py"
NO_SUCH_PROCESS = "refused: No such process (3)"
#: What Landlock's scope of signals says (Linux 6.12).
NOT_PERMITTED = "refused: Operation not permitted (1)"


def _without(*walls: str) -> list[str]:
    return [word for wall in walls for word in ("--without", wall)]


def _outcome(jailed: JailedMicrovm, attack: str) -> str:
    pattern = re.compile(rf"^drill {attack}: (.*)$", re.MULTILINE)
    return str(wait_for(lambda: pattern.search(jailed.output()), jailed.describe)[1])


@contextmanager
def _bystander(uid: int = UID, gid: int = GID) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"], user=uid, group=gid, extra_groups=[], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _ended_by_seccomp(jailed: JailedMicrovm, cell: str) -> None:
    wait_for(lambda: re.search(rf"{cell} \(pid \d+\): wall seccomp: ended", jailed.log()), jailed.describe)


# ---------------------------------------------------------------- by descriptors of processes

ROLES = {"vcpu": "vcpu 0", "vmm": "vmm"}


@pytest.mark.parametrize("role", ROLES)
def test_a_pidfd_of_another_process(base: Path, role: str) -> None:
    with _bystander() as bystander:
        drill = f"pidfd-kill={bystander.pid}"
        armed = ("--drill", f"{role}:{drill}")
        with microvm(base, *armed, microvm_id=id_of(base, "filter")) as jailed:
            jailed.start()
            _ended_by_seccomp(jailed, ROLES[role])
        with microvm(base, *armed, *_without("seccomp", "landlock"), microvm_id=id_of(base, "namespace")) as jailed:
            jailed.start()
            assert _outcome(jailed, drill) == NO_SUCH_PROCESS
        assert bystander.poll() is None
        off = _without("seccomp", "landlock", "pid-namespace", "cell-identity")
        with microvm(base, *armed, *off, microvm_id=id_of(base, "off")) as jailed:
            jailed.start()
            assert _outcome(jailed, drill).startswith("succeeded")
            assert bystander.wait(30) == -signal.SIGKILL


def test_a_pidfd_of_the_own_supervisor_that_a_socket_gives(base: Path) -> None:
    """The controller's filter lets it end processes by their pidfds: its workers are ended so."""
    options = ("--drill", "vmm:peer-kill=supervisor", *_without("seccomp", "landlock"))
    with microvm(base, *options, microvm_id=id_of(base, "namespace")) as jailed:
        jailed.start()
        refused = ("refused: Invalid argument (22)", "refused: Protocol not available (92)")  # none before Linux 6.5
        assert _outcome(jailed, "peer-kill=supervisor") in refused
        jailed.wait_up()
    if _outcome(jailed, "peer-kill=supervisor") == refused[1]:
        return
    options = ("--drill", "vmm:peer-kill=supervisor", *_without("seccomp", "landlock", "pid-namespace"))
    with microvm(base, *options, microvm_id=id_of(base, "off")) as jailed:
        assert jailed.start().process.wait(30) == -signal.SIGKILL  # the supervisor


# ---------------------------------------------------------------- controllers


@pytest.mark.parametrize("attack", ["kick", "kill"])
def test_a_controller_signals_by_number(base: Path, attack: str) -> None:
    """A filter stops it (test_attacks.py); here is the other wall, and none."""
    number = {"kick": 34, "kill": 9}[attack]
    with _bystander() as bystander, microvm(base, microvm_id=id_of(base, "other")) as other:
        cells = other.start().wait_up().wait_cells("vmm", "vcpu 0")
        targets = (str(bystander.pid), "supervisor", *(str(cells[each]) for each in ("vmm", "vcpu 0")))
        for index, target in enumerate(targets):
            options = ("--drill", f"vmm:{attack}={target}", *_without("seccomp", "landlock"))
            with microvm(base, *options, microvm_id=id_of(base, f"namespace-{index}")) as jailed:
                jailed.start()
                assert _outcome(jailed, f"{attack}={target}") == NO_SUCH_PROCESS
                jailed.wait_up()
        assert bystander.poll() is None
        assert other.api("GET", "/").status == 200
        options = ("--drill", f"vmm:{attack}={bystander.pid}", *_without("seccomp", "landlock", "pid-namespace"))
        with microvm(base, *options, microvm_id=id_of(base, "off")) as jailed:
            jailed.start()
            assert bystander.wait(30) == -number
    options = ("--drill", f"vmm:{attack}=supervisor", *_without("seccomp", "landlock", "pid-namespace"))
    with microvm(base, *options, microvm_id=id_of(base, "own")) as jailed:
        assert jailed.start().process.wait(30) == -number


# ---------------------------------------------------------------- without a jail, as root


class Unjailed:
    """A launch without a jail whose cells attack."""

    def __init__(self, directory: Path, name: str, off: str, *drills: str) -> None:
        self.errors = directory / f"{name}.errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [PYTHON, "-IS", PROGRAM, str(ROOT), off, *drills],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip

    def said(self, pattern: str) -> str:
        match = wait_for(lambda: re.search(pattern, self.errors.read_text(), re.MULTILINE), self.errors.read_text)
        return str(match[1])


@contextmanager
def unjailed(directory: Path, name: str, off: str, *drills: str) -> Iterator[Unjailed]:
    running = Unjailed(directory, name, off, *drills)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("attack", ["kick", "kill", "pidfd-kill"])
def test_without_a_jail_as_root(base: Path, role: str, attack: str) -> None:
    number = 34 if attack == "kick" else 9
    with _bystander(0, 0) as bystander:  # any root process of the host
        drill = f"{attack}={bystander.pid}"
        for target in (drill, f"{attack}=supervisor"):
            with unjailed(base.parent, f"namespace-{target}", "seccomp,landlock", f"{role}:{target}") as running:
                assert running.said(rf"^(?:vcpu 0: )?drill {target}: (.*)$") == NO_SUCH_PROCESS
        if role == "vcpu":
            with unjailed(base.parent, "user", "seccomp,landlock,pid-namespace", f"{role}:{drill}") as running:
                assert running.said(rf"^(?:vcpu 0: )?drill {drill}: (.*)$") == NOT_PERMITTED
        with unjailed(base.parent, "filter", "landlock,pid-namespace,cell-identity", f"{role}:{drill}") as running:
            running.said(rf"({ROLES[role]}) \(pid \d+\): wall seccomp: ended by the filter")
        if landlock.abi() >= landlock.SCOPE_ABI:
            with unjailed(base.parent, "landlock", "seccomp,pid-namespace,cell-identity", f"{role}:{drill}") as running:
                assert running.said(rf"^(?:vcpu 0: )?drill {drill}: (.*)$") == NOT_PERMITTED
        assert bystander.poll() is None
        off = "seccomp,landlock,pid-namespace,cell-identity"
        with unjailed(base.parent, "off", off, f"{role}:{drill}") as running:
            assert running.said(rf"^(?:vcpu 0: )?drill {drill}: (.*)$").startswith("succeeded")
            assert bystander.wait(30) == -number
    with unjailed(base.parent, "own", off, f"{role}:{attack}=supervisor") as running:
        assert running.process.wait(30) == -number
