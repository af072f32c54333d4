"""Users of workers: whose they are, who else has them, and what happens where they cannot be had."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from devtool.project import PYTHON, ROOT
from ipc.launch_plan import CELL_UIDS
from jailer.steps import identity, user_namespace
from tests.harness.attacks import outcomes
from tests.harness.jail import GID, UID, JailedMicrovm, id_of, microvm, namespace, status, wait_for

ALL = ("vmm", "vcpu 0")
#: Without the root wall the host's /run would be the cell's.
RELATIVE = ("--api-sock", "api.socket")
NO_CAPABILITIES = "0" * 16


def _ids(pid: int) -> tuple[int, int]:
    """Return the user and group of a process, all four of each alike, without another group."""
    found = status(pid)
    assert found["Groups"] == ""
    users, groups = ({int(each) for each in found[name].split()} for name in ("Uid", "Gid"))
    assert len(users) == len(groups) == 1
    return users.pop(), groups.pop()


def _boot(jailed: JailedMicrovm) -> dict[str, int]:
    """Return controller and worker of a running microVM."""
    jailed.boot()
    return {name: pid for name, pid in jailed.wait_cells(*ALL).items() if name in ALL}


def test_a_worker_is_who_nobody_else_is(base: Path) -> None:
    """Two microVMs of one user, at the same time."""
    with microvm(base, microvm_id=id_of(base, "a")) as first, microvm(base, microvm_id=id_of(base, "b")) as second:
        workers = []
        for jailed in (first, second):
            cells = _boot(jailed)
            assert _ids(cells["vmm"]) == _ids(jailed.process.pid) == (UID, GID)
            uid, gid = _ids(cells["vcpu 0"])
            assert uid == gid
            assert user_namespace.FIRST_UID <= uid < user_namespace.END_UID
            workers.append(uid - uid % CELL_UIDS)
            assert namespace(cells["vmm"], "user") == namespace("self", "user")
            assert namespace(cells["vcpu 0"], "user") == namespace(jailed.process.pid, "user")
            assert namespace(cells["vcpu 0"], "user") != namespace("self", "user")
        assert workers[0] != workers[1]


def test_capabilities_of_the_supervisor_end_at_its_cells(base: Path) -> None:
    with microvm(base) as jailed:
        cells = _boot(jailed)
        kept = f"{identity.SUPERVISOR_CAPABILITIES:016x}"
        supervisor = status(jailed.process.pid)
        assert (supervisor["CapPrm"], supervisor["CapEff"]) == (kept, kept)
        assert {supervisor[each] for each in ("CapInh", "CapBnd", "CapAmb")} == {NO_CAPABILITIES}
        users = Path(f"/proc/{cells['vcpu 0']}/uid_map").read_text().split()
        first = _ids(cells["vcpu 0"])[0]
        assert list(map(int, users)) == [first, first, CELL_UIDS, UID, UID, 1]
        for pid in cells.values():
            assert {status(pid)[each] for each in ("CapPrm", "CapEff", "CapBnd")} == {NO_CAPABILITIES}


def test_users_that_are_given(base: Path) -> None:
    with microvm(base, "--cell-uids", "1280000") as jailed:
        assert _ids(_boot(jailed)["vcpu 0"]) == (1280000, 1280000)
        assert jailed.wall_records()["vcpu 0"]["found"]["uid"] == [1280000] * 4


@pytest.mark.parametrize("text", ["0", "1000", "-128", "x", str((1 << 31) - 1), str(1 << 31)])
def test_users_that_cannot_be(base: Path, text: str) -> None:
    with microvm(base, "--cell-uids", text) as jailed:
        assert jailed.run() == 1
        assert f"Invalid cell-uids: {text}: the first of 128 users, a multiple of 128" in jailed.output()


def test_users_that_are_the_controllers(base: Path) -> None:
    with microvm(base, "--cell-uids", str(UID - UID % CELL_UIDS)) as jailed:
        assert jailed.run() == 1
        first = UID - UID % CELL_UIDS
        assert f"users {first} to {first + 127} are those of the cells: --uid or --gid is one" in jailed.output()


def test_without_the_wall_a_worker_has_the_controllers_user(base: Path) -> None:
    with microvm(base, "--without", "cell-identity") as jailed:
        cells = _boot(jailed)
        assert {_ids(pid) for pid in (*cells.values(), jailed.process.pid)} == {(UID, GID)}
        assert status(jailed.process.pid)["CapPrm"] == NO_CAPABILITIES
        assert "switched off: cell-identity" in jailed.log()


_IN_A_CHROOT = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.venv/lib/python3.11/site-packages"]
from jailer.errors import StepError
from jailer.steps import user_namespace
os.chroot(sys.argv[2])
first, capabilities = int(sys.argv[3]), int(sys.argv[4], 16)
try:
    made = user_namespace.make(1, 1, first, capabilities)
except StepError as error:
    print(error)
else:
    print(made.first_uid, made.unavailable)
"""


def _make_in_a_chroot(directory: Path, first: int, capabilities: int = (1 << 41) - 1) -> str:
    """The kernel makes no user namespace for who is in a chroot: as good as a host that has none."""
    command = [str(PYTHON), "-IS", "-c", _IN_A_CHROOT, str(ROOT), str(directory), str(first), f"{capabilities:x}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_where_there_are_no_user_namespaces_it_is_said(tmp_path: Path) -> None:
    reason = "no user namespace can be made: Operation not permitted (os error 1)"
    assert _make_in_a_chroot(tmp_path, 0) == f"0 {reason}"
    assert _make_in_a_chroot(tmp_path, 1280000) == f"--cell-uids 1280000: {reason}"
    reason = "CAP_SETUID, CAP_SETGID and CAP_SYS_ADMIN on the host are needed"
    assert _make_in_a_chroot(tmp_path, 0, 1 << 7) == f"0 {reason}"


def test_user_zero_is_asked_for_by_name(base: Path) -> None:
    with microvm(base, uid=0, gid=0, microvm_id=id_of(base, "refused")) as jailed:
        assert jailed.run() == 1
        assert (
            "--uid 0: every process of root is of the microVM's user then; give it a user of its own, or say --without "
            "unprivileged-user"
        ) in jailed.output()
        assert not jailed.directory.exists()
    with microvm(base, "--without", "unprivileged-user", uid=0, gid=0) as jailed:
        cells = _boot(jailed)
        assert _ids(cells["vmm"]) == _ids(jailed.process.pid) == (0, 0)
        assert _ids(cells["vcpu 0"])[0] >= user_namespace.FIRST_UID
        assert {status(pid)["CapEff"] for pid in cells.values()} == {NO_CAPABILITIES}
        assert "switched off: unprivileged-user" in jailed.log()
    off = ("--without", "unprivileged-user", "--without", "cell-identity")
    with microvm(base, *off, uid=0, gid=0, microvm_id=id_of(base, "all")) as jailed:
        cells = _boot(jailed)
        assert {_ids(pid) for pid in cells.values()} == {(0, 0)}


def test_nothing_is_left_of_the_process_that_holds_the_namespace() -> None:
    before = set(os.listdir("/proc/self/fd"))
    children = Path("/proc/thread-self/children")
    others = children.read_text()
    made = user_namespace.make(UID, GID, 0, (1 << 41) - 1)
    other = user_namespace.make(UID, GID, 0, (1 << 41) - 1)
    os.close(made.descriptor)
    os.close(other.descriptor)
    assert made.first_uid != other.first_uid
    assert set(os.listdir("/proc/self/fd")) == before
    assert children.read_text() == others


@pytest.mark.parametrize("file", ["environ", "maps", "fd", "fdinfo/0", "root"])
@pytest.mark.parametrize("victim", ["vmm", "supervisor", "vcpu 0"])
def test_nobody_looks_into_another_microvm_of_the_user(base: Path, victim: str, file: str) -> None:
    """Nothing but its user is around the attacker, and nothing at all hides the victim from its own user."""
    bare = ["seccomp", "landlock", "root", "pid-namespace", "dumpable"]
    seen = []
    for off in ([], ["cell-identity"]):
        words = [word for wall in (*bare, *off) for word in ("--without", wall)]
        not_hidden = [word for wall in ("dumpable", *off) for word in ("--without", wall)]
        names = [id_of(base, f"{len(off)}-{each}") for each in ("victim", "attacker")]
        with microvm(base, *not_hidden, microvm_id=names[0]) as other:
            pid = other.start().wait_up().wait_cells(*ALL)[victim]
            drill = f"read=/proc/{pid}/{file}"
            with microvm(base, "--drill", drill, *words, microvm_id=names[1], arguments=RELATIVE) as jailed:
                jailed.start()
                seen.append(wait_for(partial(_outcome_of, jailed, drill), jailed.describe))
    assert seen[0] == "EACCES"
    # The supervisor became its user while it ran: for that alone it is not dumpable.
    assert seen[1] == ("EACCES" if victim == "supervisor" else "EISDIR" if file in ("fd", "root") else "open")


def _outcome_of(jailed: JailedMicrovm, drill: str) -> str | None:
    return outcomes(jailed.output()).get(drill)


def test_a_worker_and_its_successor_are_two_users(base: Path) -> None:
    """They exist at the same time; the third is who the first was."""
    with microvm(base) as jailed:
        users = [_ids(_boot(jailed)["vcpu 0"])[0]]
        for _ in range(3):
            assert jailed.api("PATCH", "/vcpus/0", {"action": "Replace"}).status == 204
            (vcpu,) = jailed.api("GET", "/vcpus").body
            users.append(_ids(vcpu["pid"])[0])
        first = users[0]
        assert users == [first, first + 1, first, first + 1]
        assert first % 2 == 0
