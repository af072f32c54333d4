"""The drills: their names, their system calls' numbers, and what a command line may say of them."""

from __future__ import annotations

import errno
import os

import pytest

from ipc import drills
from ipc.drills import calls, targets
from jailer.seccomp.names import SYSCALL_NAMES


def test_numbers_are_the_kernels() -> None:
    assert {name: SYSCALL_NAMES.get(number) for name, number in calls.NUMBERS.items()} == {
        name: name for name in calls.NUMBERS
    }


def test_every_name_is_there_once() -> None:
    kinds = [{*kind.ATTEMPTS, *kind.AIMED} for kind in drills.KINDS]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("good", ["chroot", "vmm:chroot", "supervisor:chroot", "vcpu:kick=1", "kill=self", "read=/a:b"])
def test_good_specifications(good: str) -> None:
    drills.check((good,))


@pytest.mark.parametrize("bad", ["nonsense", "janitor:chroot", "kick", "kick=", "chroot=1", "", "vmm:", "vmm:vmm:open"])
def test_bad_specifications(bad: str) -> None:
    with pytest.raises(ValueError, match="a drill is one of execve, "):
        drills.check((bad,))


def test_only_the_role_that_is_meant_attacks(capfd: pytest.CaptureFixture[str]) -> None:
    drills.run(("uname", "vmm:getcwd", "supervisor:open-passwd"), "vmm")
    assert capfd.readouterr().err == "drill getcwd: succeeded (returned " + str(len(os.getcwd()) + 1) + ")\n"


def test_what_is_refused_is_told_with_its_errno(capfd: pytest.CaptureFixture[str]) -> None:
    drills.run(("read=/no/such",), "vcpu")
    assert capfd.readouterr().err == "drill read=/no/such: refused: No such file or directory (2)\n"


def test_an_errno_behind_the_permission_checks_is_a_success() -> None:
    assert calls.call("rmdir", b"/no/such", reached=(errno.ENOENT,))() == "reached: ENOENT"
    with pytest.raises(OSError, match="No such file"):
        calls.call("rmdir", b"/no/such")()


def test_targets() -> None:
    assert targets.named("self") == os.getpid()
    assert targets.named("17") == 17
    for nobody in ("0", "controller"):  # 0 would be our own group; there is no controller here
        with pytest.raises(ProcessLookupError):
            targets.named(nobody)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if targets.named("supervisor") == os.getppid() == targets.neighbour() else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_who_cannot_fork_attacks_its_parent_still() -> None:
    pid = os.fork()
    if pid == 0:
        parent = targets.named("supervisor")
        targets._note_forker()  # what a fork does first, whether it is refused or not
        os._exit(0 if targets.named("supervisor") == parent == os.getppid() else 1)
    assert os.waitpid(pid, 0)[1] == 0
