"""Rulesets: what each level of Landlock is asked for, and what the kernel makes of it in a child."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

import pytest

from ipc.launch_plan import ROLE_DEVICE, ROLE_SUPERVISOR, ROLE_VCPU, ROLE_VMM
from jailer import landlock, syscalls
from jailer.errors import StepError
from jailer.steps import identity


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Return what the kernel is asked for: handled rights on files, on TCP, scopes."""
    found: list[tuple[int, int, int]] = []

    def create(attributes: bytes) -> int:
        found.append(landlock._RULESET.unpack(attributes))
        return -1

    monkeypatch.setattr(syscalls, "landlock_create_ruleset", create)
    return found


@pytest.mark.parametrize(
    ("level", "handled"),
    [
        (1, (0x1FFF, 0, 0)),
        (2, (0x3FFF, 0, 0)),
        (3, (0x7FFF, 0, 0)),
        (4, (0x7FFF, 3, 0)),
        (5, (0xFFFF, 3, 0)),
        (6, (0xFFFF, 3, 3)),
        (7, (0xFFFF, 3, 3)),
        (99, (0xFFFF, 3, 3)),
    ],
)
def test_each_level_is_asked_for_what_it_has(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int, int]], level: int, handled: tuple[int, int, int]
) -> None:
    files, tcp, scopes = handled
    monkeypatch.setattr(landlock, "abi", lambda: level)
    rulesets = landlock.Rulesets(wanted=True)
    expected = dict.fromkeys((ROLE_VMM, ROLE_VCPU), (files, tcp, scopes))
    expected[ROLE_SUPERVISOR] = (files, tcp, scopes & 1)
    assert dict(zip(rulesets.by_role, asked, strict=False)) == expected
    assert asked[3:] == ([(0, 0, 3)] if level >= 6 else [])  # no files: whoever has a domain of them cannot mount
    assert rulesets.asked(ROLE_VCPU)["files"] == []
    assert rulesets.asked(ROLE_DEVICE) == rulesets.asked(ROLE_VCPU)
    assert rulesets.descriptor(ROLE_DEVICE) == rulesets.descriptor(ROLE_VCPU)
    assert rulesets.asked(ROLE_VMM)["abi"] == level


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_kernel_without_it_is_no_error(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "landlock_abi", refuse)
    rulesets = landlock.Rulesets(wanted=True)
    rulesets.enter_domain()
    assert not rulesets.enforce(ROLE_VCPU)
    assert rulesets.descriptor(ROLE_VCPU) == -1
    assert rulesets.asked(ROLE_VCPU) == {"abi": 0}


def test_another_error_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_attributes: bytes) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(landlock, "abi", lambda: 7)
    monkeypatch.setattr(syscalls, "landlock_create_ruleset", refuse)
    with pytest.raises(StepError, match=r"Failed to make a Landlock ruleset: Out of memory \(os error 12\)"):
        landlock.Rulesets(wanted=True)


def test_switched_off_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: pytest.fail("asked"))
    assert landlock.Rulesets(wanted=False).by_role == {}


def _in_child(attempt: Callable[[], None]) -> int:
    """Return the errno that an attempt ends with in a child, 0 if it succeeds."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            attempt()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _under(role: str, attempt: Callable[[], object], *, root: bool = False) -> int:
    def child() -> None:
        identity.set_no_new_privileges()
        rulesets = landlock.Rulesets(wanted=True)
        rulesets.enter_domain()
        if root:
            rulesets.allow_root(role)
        rulesets.enforce(role)
        attempt()

    return _in_child(child)


def test_the_kernel_refuses_what_is_not_asked_for(tmp_path: os.PathLike[str]) -> None:
    level = landlock.abi()
    if not level:
        return  # a kernel without it has nothing to show; the jail tests say what the report says then
    file = os.path.join(tmp_path, "file")
    assert _under(ROLE_VCPU, lambda: os.open("/etc/passwd", os.O_RDONLY)) == errno.EACCES
    assert _under(ROLE_VMM, lambda: os.open("/etc/passwd", os.O_RDONLY)) == errno.EACCES
    assert _under(ROLE_VMM, lambda: os.open("/etc/passwd", os.O_RDONLY), root=True) == 0
    assert _under(ROLE_VMM, lambda: os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)), root=True) == 0
    assert _under(ROLE_VMM, lambda: os.unlink(file), root=True) == 0
    assert _under(ROLE_VMM, lambda: os.mkfifo(file), root=True) == errno.EACCES
    assert _under(ROLE_VMM, lambda: os.mkdir(file), root=True) == errno.EACCES
    assert _under(ROLE_VMM, lambda: os.symlink("x", file), root=True) == errno.EACCES
    assert _under(ROLE_VMM, lambda: os.execv("/bin/true", ["true"]), root=True) == errno.EACCES
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        service.listen()
        address = service.getsockname()
        assert _under(ROLE_VMM, lambda: socket.create_connection(address)) == (errno.EACCES if level >= 4 else 0)
    assert _under(ROLE_VCPU, lambda: os.kill(os.getppid(), 0)) == (errno.EPERM if level >= 6 else 0)
