"""Wall by wall: with it switched off (``--without``) an attack succeeds, with it on it is refused, all else the same.

Where the filter would hide a wall, it is off on both sides. And: a wall that is silently not built is found.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from devtool.project import PYTHON, ROOT
from jailer.steps import roots
from tests.harness.attacks import FILTER, outcomes
from tests.harness.jail import JAILER, JailedMicrovm, id_of, microvm, wait_for
from tests.harness.run_options import NoLeftovers

SABOTAGE = Path(__file__).resolve().parents[1] / "harness" / "sabotage.py"
SECRET = "cellblock-secret"
#: Without the root wall the host's /run would be the cell's.
RELATIVE = ("--api-sock", "api.socket")


def _attack(
    base: Path, drill: str, off: Sequence[str] = (), *options: str, start: dict[str, Any] | None = None, **keywords: Any
) -> str:
    """Launch with a drill and some walls off; return ``open`` or what it was refused by."""
    words = [word for wall in off for word in ("--without", wall)]
    if "root" in off:
        keywords.setdefault("arguments", RELATIVE)
    name = drill.partition(":")[2] or drill
    keywords.setdefault("microvm_id", id_of(base, f"{len(off)}-{'-'.join(off)[:20]}"))
    with microvm(base, "--drill", drill, *words, *options, **keywords) as jailed:
        jailed.start(**(start or {}))
        return str(wait_for(lambda: outcomes(jailed.output()).get(name), lambda: f"{drill}: {jailed.describe()}"))


CELLS = ("vcpu", "vmm", "supervisor")


@pytest.mark.parametrize("cell", CELLS)
def test_identity(base: Path, cell: str) -> None:
    """Combination: without the filter, and a worker without a user of its own, which it would have all the same."""
    assert _attack(base, f"{cell}:be-root", ["seccomp", "cell-identity", "identity"]) == "open"
    assert _attack(base, f"{cell}:be-root", ["seccomp", "cell-identity"]) == "EPERM"


#: What a worker tries on its controller, by number or by a descriptor, and cannot by its user alone.
ON_ANOTHER = (
    "ptrace", "ptrace-seize", "process-vm-readv", "process-vm-writev", "pidfd-getfd", "pidfd-send-signal", "kill",
    "tkill", "tgkill", "rt-sigqueueinfo", "prlimit", "sched-setaffinity", "setpriority",
)  # fmt: skip
#: A cell with nothing around it but its user.
BARE = ("seccomp", "landlock", "pid-namespace", "dumpable")


@pytest.mark.parametrize("drill", ON_ANOTHER)
def test_cell_identity(base: Path, drill: str) -> None:
    """Combination: without the filter, Landlock, the pid namespace and what hides a cell from others of its user."""
    assert _attack(base, f"vcpu:{drill}", [*BARE, "cell-identity"]) == "open"
    assert _attack(base, f"vcpu:{drill}", BARE) == "EPERM"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("drill", ["chroot", "unshare-mount"])
def test_capabilities(base: Path, cell: str, drill: str) -> None:
    """Combination: without the filter, as user 0, for another user would have lost them by the change."""
    off = ["seccomp", "identity", "cell-identity"]
    if (cell, drill) != ("vcpu", "unshare-mount"):  # a process of several threads may not, whatever it is allowed
        assert _attack(base, f"{cell}:{drill}", [*off, "capabilities"]) == "open"
    assert _attack(base, f"{cell}:{drill}", off) == "EPERM"


def _await_line(jailed: JailedMicrovm, text: str) -> None:
    wait_for(lambda: text in jailed.output(), jailed.describe)


def test_no_new_privileges(base: Path) -> None:
    """Combination: without the filter and the root, so that there is a set-user-ID program to execute."""
    program = base.parent / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    for off, is_root in ((["no-new-privileges"], True), ([], False)):
        words = [word for wall in ("seccomp", "landlock", "root", *off) for word in ("--without", wall)]
        which = id_of(base, f"nnp-{len(off)}")
        with microvm(base, "--drill", f"vmm:execute={program}", *words, microvm_id=which, arguments=RELATIVE) as jailed:
            jailed.start()
            _await_line(jailed, "uid=12345")
            assert ("euid=0(root)" in jailed.output()) == is_root, jailed.output()


@pytest.mark.parametrize("cell", CELLS)
def test_root(base: Path, cell: str) -> None:
    """Combination: without the filter, which lets no worker open anything, and without Landlock."""
    secret = base.parent / "secret"
    secret.write_text(SECRET)
    assert _attack(base, f"{cell}:read={secret}", ["seccomp", "landlock", "root"]) == "open"
    assert _attack(base, f"{cell}:read={secret}", ["seccomp", "landlock"]) == "ENOENT"


@contextmanager
def _segment() -> Iterator[int]:
    """A System V segment of the host that everybody may read; its key."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    key = int.from_bytes(os.urandom(3), "big") + 1
    number = libc.shmget(key, 4096, 0o1666)
    assert number >= 0, os.strerror(ctypes.get_errno())
    try:
        yield key
    finally:
        libc.shmctl(number, 0, None)


@pytest.mark.parametrize("cell", CELLS)
def test_ipc_namespace(base: Path, cell: str) -> None:
    """Combination: without the filter."""
    with _segment() as key:
        assert _attack(base, f"{cell}:read-segment={key}", ["seccomp", "ipc-namespace"]) == "open"
        assert _attack(base, f"{cell}:read-segment={key}", ["seccomp"]) == "ENOENT"


@pytest.mark.parametrize("cell", CELLS)
def test_uts_namespace(base: Path, cell: str) -> None:
    """Combination: without the filter, as user 0 with capabilities. A namespace of this test stands for the host."""
    walls = ["seccomp", "identity", "cell-identity", "capabilities"]
    with subprocess.Popen(["unshare", "--uts", "sh", "-c", "hostname original; exec sleep 1000"]) as host:
        try:
            inside = ("nsenter", f"--uts=/proc/{host.pid}/ns/uts")

            def name() -> str:
                return subprocess.run([*inside, "hostname"], capture_output=True, text=True, check=True).stdout.strip()

            wait_for(lambda: name() == "original", "the host's name")
            assert _attack(base, f"{cell}:sethostname", walls, program=(*inside, JAILER)) == "open"
            assert name() == "original"  # it has renamed its own namespace
            assert _attack(base, f"{cell}:sethostname", [*walls, "uts-namespace"], program=(*inside, JAILER)) == "open"
            assert name() == "drill"
        finally:
            host.kill()


@pytest.mark.parametrize("cell", ["vcpu", "supervisor"])
def test_network_namespace(base: Path, cell: str) -> None:
    """Combination: without the filter and Landlock's scope. (The controller's: test_network.py.)"""
    name = id_of(base, "listener")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        assert _attack(base, f"{cell}:abstract-connect={name}", ["seccomp", "landlock", "network-namespace"]) == "open"
        assert _attack(base, f"{cell}:abstract-connect={name}", ["seccomp", "landlock"]) == "ECONNREFUSED"


@pytest.mark.parametrize("cell", CELLS)
def test_limits(base: Path, cell: str) -> None:
    start = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))}
    own = ["kernel-limits"]  # a worker has a limit of its own beside that of the launch
    assert _attack(base, f"{cell}:descriptor-bomb", ["limits", *own], start=start) == "open"
    assert _attack(base, f"{cell}:descriptor-bomb", own, start=start) == "EMFILE"


@pytest.mark.parametrize("drill", ["descriptor-bomb", "mlock"])
def test_kernel_limits(base: Path, drill: str) -> None:
    """Combination: without the filter and the limits of the launch."""
    start = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))}
    off = ["seccomp", "limits"]
    refused = {"descriptor-bomb": "EMFILE", "mlock": "EPERM"}[drill]
    assert _attack(base, f"vcpu:{drill}", [*off, "kernel-limits"], start=start) == "open"
    assert _attack(base, f"vcpu:{drill}", off, start=start) == refused


@pytest.mark.parametrize("cell", ["vcpu", "vmm", "supervisor"])
def test_memory_limit(base: Path, cell: str) -> None:
    assert _attack(base, f"{cell}:memory-bomb=512", ["memory-limit"]) == "open"
    assert _attack(base, f"{cell}:memory-bomb=512") == "ENOMEM"


@pytest.mark.parametrize("cell", ["supervisor"])
def test_descriptors(base: Path, cell: str) -> None:
    """Cells close what they were not given in any case; it is the supervisor that would keep what the caller had."""
    secret = base.parent / "secret"
    secret.write_text(SECRET)
    with secret.open() as file:
        os.dup2(file.fileno(), 100)
    try:
        start = {"pass_fds": (100,)}
        assert _attack(base, f"{cell}:read-descriptor=100", ["descriptors"], start=start) == "open"
        assert _attack(base, f"{cell}:read-descriptor=100", start=start) == "EBADF"
        assert _attack(base, "vmm:read-descriptor=100", ["descriptors"], start=start, microvm_id=id_of(base)) == "EBADF"
    finally:
        os.close(100)


@pytest.mark.parametrize("cell", CELLS)
def test_environment(base: Path, cell: str) -> None:
    start = {"env": {**os.environ, "CELLBLOCK_TEST_SECRET": SECRET}}
    assert _attack(base, f"{cell}:environment=CELLBLOCK_TEST_SECRET", ["environment"], start=start) == "open"
    assert _attack(base, f"{cell}:environment=CELLBLOCK_TEST_SECRET", start=start) == "ENOENT"


def test_cgroup(base: Path) -> None:
    """Combination: without the filter and the process limit, which forbid the first child already."""
    walls = ["seccomp", "process-limit"]
    limit = ("--cgroup", "pids.max=40", "--parent-cgroup", id_of(base, "parent"), "--cleanup")
    assert _attack(base, "vmm:fork-bomb", [*walls, "cgroup"], *limit) == "open"
    assert _attack(base, "vmm:fork-bomb", walls, *limit) == "EAGAIN"


@pytest.mark.parametrize("cell", CELLS)
def test_core_limit(base: Path, cell: str) -> None:
    """Combination: without the filter."""
    assert _attack(base, f"{cell}:core-limit", ["seccomp", "core-limit"]) == "open"
    assert _attack(base, f"{cell}:core-limit", ["seccomp"]) == "EPERM"


@pytest.mark.parametrize("cell", ["vcpu", "vmm"])
@pytest.mark.parametrize("drill", ["fork", "thread"])
def test_process_limit(base: Path, cell: str, drill: str) -> None:
    """Combination: without the filter."""
    assert _attack(base, f"{cell}:{drill}", ["seccomp", "process-limit"]) == "open"
    assert _attack(base, f"{cell}:{drill}", ["seccomp"]) == "EAGAIN"


@pytest.mark.parametrize("drill", ["ptrace", "process-vm-readv", "pidfd-getfd"])
def test_dumpable(base: Path, drill: str) -> None:
    """Combination: without the filter, Landlock and users of their own.

    A worker attacks the controller: it is who must not be dumpable.

    The supervisor has become another user while it ran, and is not dumpable for that alone.
    """
    assert _attack(base, f"vcpu:{drill}", ["seccomp", "landlock", "cell-identity", "dumpable"]) == "open"
    assert _attack(base, f"vcpu:{drill}", ["seccomp", "landlock", "cell-identity"]) == "EPERM"
    off = ["seccomp", "landlock", "dumpable", "pid-namespace"]
    assert _attack(base, f"vmm:{drill}", off, microvm_id=id_of(base, "vmm")) == "EPERM"


@pytest.mark.parametrize("cell", CELLS)
def test_seccomp(base: Path, cell: str) -> None:
    """What it alone stops. The rest: test_attack_table.py."""
    assert _attack(base, f"{cell}:executable-mapping", ["seccomp"]) == "open"
    assert _attack(base, f"{cell}:executable-mapping", (), "--seccomp-mode", "errno=133") == FILTER


@pytest.mark.parametrize("mounted", [True, False])
def test_the_kernel_cache_leads_nowhere_else(base: Path, mounted: bool) -> None:
    """A controller that holds the directory climbs out of it, unless it is the root of a mount of its own."""
    cache = base.parent / "cache"
    cache.mkdir()
    (base.parent / "secret").write_text(SECRET)
    descriptor = roots.clone_read_only(str(cache)) if mounted else os.open(cache, os.O_RDONLY)
    try:
        above = os.open("..", os.O_RDONLY, dir_fd=descriptor)
        names = os.listdir(above)
        os.close(above)
        assert ("secret" in names) != mounted
        with pytest.raises(OSError, match="Read-only") if mounted else nullcontext():
            os.close(os.open("planted", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- a wall that is silently missing

#: What is not built → what the launch says of it (the name of the wall in the report), and what else is off.
SABOTAGED = {
    "uid": ("uid", ("seccomp",)),
    "gid": ("gid", ()),
    "groups": ("groups", ()),
    "capabilities": ("capabilities", ()),
    "no_new_privs": ("no_new_privs", ("seccomp", "landlock")),
    "ipc": ("namespaces", ()),
    "uts": ("namespaces", ()),
    "core": ("limits", ()),
    "processes": ("limits", ()),
    "bounds": ("limits", ()),
    "open-files": ("limits", ()),
}


def _sabotaged(base: Path, wall: str, *options: str, **keywords: Any) -> JailedMicrovm:
    off = [word for each in SABOTAGED[wall][1] for word in ("--without", each)]
    program = (PYTHON, "-IS", SABOTAGE, str(ROOT), wall)
    return JailedMicrovm(base, *off, *options, program=program, arguments=("idle",), **keywords)


@pytest.mark.parametrize("wall", SABOTAGED)
def test_a_missing_wall_ends_the_launch(base: Path, no_leftovers: NoLeftovers, wall: str) -> None:
    start = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))}
    jailed = _sabotaged(base, wall)
    with no_leftovers(names=(id_of(base),)):
        jailed.start(**start)
        try:
            assert jailed.process.wait(60) == 1, jailed.describe()
        finally:
            jailed.destroy()
    assert f"walls differ: {SABOTAGED[wall][0]}: asked " in jailed.log()
    assert "stand-in: sealed" not in jailed.output()


@pytest.mark.parametrize("wall", ["groups", "ipc", "core"])
def test_without_verification_it_is_only_reported(base: Path, wall: str) -> None:
    jailed = _sabotaged(base, wall, "--without", "verify")
    jailed.start()
    try:
        wait_for(lambda: "stand-in: sealed" in jailed.output(), jailed.describe)
        record = wait_for(lambda: jailed.wall_records().get("vmm"), jailed.describe)
        assert not record["verified"]
        name = SABOTAGED[wall][0]
        assert record["asked"][name] != record["found"][name]
        assert any(line.startswith(f"{name}: asked ") for line in record["differences"])
    finally:
        jailed.destroy()
