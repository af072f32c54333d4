"""Bad command lines and hosts that refuse: one clear error, exit status 1, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.jail import FIRECRACKER, JAILER, id_of, microvm, stand_in
from tests.harness.run_options import NoLeftovers

GOOD = {"--exec-file": str(FIRECRACKER), "--uid": "12345", "--gid": "12345"}


def _run(base: Path, *options: str, **changed: str | None) -> tuple[int, str]:
    """Run the jailer with a good command line that some options change (None: left out)."""
    values: dict[str, str | None] = {**GOOD, "--id": id_of(base), "--chroot-base-dir": str(base)}
    values.update({f"--{name.replace('_', '-')}": value for name, value in changed.items()})
    words = [word for name, value in values.items() if value is not None for word in (name, value)]
    result = subprocess.run([JAILER, *words, *options], check=False, capture_output=True, text=True, timeout=60)
    assert result.stdout == ""
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("changed", "options", "text"),
    [
        ({"id": None}, (), "Arguments parsing error: Argument 'id' required, but not found."),
        ({"uid": None}, (), "Arguments parsing error: Argument 'uid' required, but not found."),
        (
            {},
            ("--nonsense", "1"),
            (
                "Arguments parsing error: Found argument 'nonsense' which wasn't expected, "
                "or isn't valid in this context."
            ),
        ),
        ({}, ("--netns",), "Arguments parsing error: The argument 'netns' requires a value, but none was supplied."),
        ({}, ("--id", "x"), "Arguments parsing error: The argument 'id' was provided more than once."),
        (
            {},
            ("--seccomp-mode", "x"),
            "Arguments parsing error: --seccomp-mode is kill, errno, errno=N, report or off, not 'x'",
        ),
        (
            {},
            ("--seccomp-mode", "errno=4096"),
            "Arguments parsing error: --seccomp-mode is kill, errno, errno=N, report or off, not 'errno=4096'",
        ),
        ({}, ("--", "--enable-pci"), "Arguments parsing error: --enable-pci is not supported yet"),
        (
            {},
            ("--", "--seccomp-filter", "f"),
            "Seccomp error: Filter file open error: f: No such file or directory (os error 2)",
        ),
        ({"id": ""}, (), "Invalid instance ID: Invalid len (0);  the length must be between 1 and 64"),
        ({"id": "a" * 65}, (), "Invalid instance ID: Invalid len (65);  the length must be between 1 and 64"),
        ({"id": "a/b"}, (), "Invalid instance ID: Invalid char (/) at position 1"),
        ({"exec_file": "/no/such"}, (), "Failed to canonicalize path /no/such: No such file or directory (os error 2)"),
        ({"exec_file": "/usr"}, (), "/usr is not a file"),
        ({"exec_file": "/dev/null"}, (), "/dev/null is not a file"),
        ({"chroot_base_dir": "/no"}, (), "Failed to canonicalize path /no: No such file or directory (os error 2)"),
        ({"chroot_base_dir": "/etc/passwd"}, (), "/etc/passwd is not a directory"),
        ({"uid": "-1"}, (), "Invalid uid: -1"),
        ({"uid": "4294967295"}, (), "Invalid uid: 4294967295"),
        ({"gid": "x"}, (), "Invalid gid: x"),
        ({}, ("--cgroup-version", "3"), "3 is an invalid cgroup version specifier"),
        (
            {},
            ("--parent-cgroup", "../x"),
            "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'",
        ),
        ({}, ("--cgroup", "cpu.shares"), "Invalid format for cgroups: cpu.shares"),
        ({}, ("--cgroup", "cpu.shares="), "Invalid format for cgroups: cpu.shares="),
        ({}, ("--cgroup", "../cpu.shares=1"), "Cgroup invalid file: ../cpu.shares"),
        ({}, ("--cgroup", "shares=1"), "Cgroup invalid file: shares"),
        ({}, ("--cgroup", "nonsense.shares=1"), "Controller nonsense is unavailable"),
        ({}, ("--resource-limit", "core=1"), "Invalid resource argument: core"),
        ({}, ("--resource-limit", "fsize"), "Invalid format for resources limits: fsize"),
        ({}, ("--resource-limit", "fsize=x"), "Invalid limit value for resource: fsize: x is not a number"),
        (
            {},
            ("--resource-limit", "no-file=99999999"),
            "Failed to set limit for resource: Operation not permitted (os error 1)",
        ),
        ({}, ("--netns", "/no/such"), "Failed to open file /no/such: No such file or directory (os error 2)"),
        (
            {},
            ("--netns", "/etc/passwd"),
            "Failed to join network namespace: netns: Invalid argument (os error 22)",
        ),
        ({}, ("--kernel-cache", "/no"), "Failed to open kernel cache /no: No such file or directory (os error 2)"),
        ({}, ("--wall-log", "/no/log"), "Failed to open file /no/log: No such file or directory (os error 2)"),
    ],
)
def test_one_error_and_nothing_left(
    base: Path, no_leftovers: NoLeftovers, changed: dict[str, str | None], options: tuple[str, ...], text: str
) -> None:
    with no_leftovers(base, names=(id_of(base),)):
        code, printed = _run(base, *options, **changed)
    if text.startswith("Arguments"):
        text += " \n\nFor more information try --help."
    assert (code, printed) == (1, f"{text}\n")


@pytest.mark.parametrize("file", ["cpu.nonsense=1", "cpu.shares=x"])
def test_cgroup_file_that_refuses(base: Path, no_leftovers: NoLeftovers, file: str) -> None:
    parent = id_of(base, "parent")
    with no_leftovers(base, names=(id_of(base),)):
        code, printed = _run(base, "--cgroup", "pids.max=5", "--cgroup", file, "--parent-cgroup", parent)
    assert code == 1
    assert printed.startswith(f"Failed to write to /sys/fs/cgroup/cpu/{parent}/{id_of(base)}/cpu.")
    assert "(os error" in printed


def test_foreign_program_is_refused(base: Path) -> None:
    code, printed = _run(base, exec_file="/bin/true")
    assert code == 1
    assert "is not a Cellblock launcher" in printed
    assert os.listdir(base) == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("symbolic", "Failed to open {path}: Symbolic link loop (os error 40)\n"),
        ("hard", "Detected hard link at: {path}\n"),
        ("fifo", "Failed to open {path}: No such device or address (os error 6)\n"),
        ("directory", "Failed to open {path}: Is a directory (os error 21)\n"),
    ],
)
def test_what_is_in_the_place_of_the_program_file(base: Path, kind: str, text: str) -> None:
    """It is not written to, as its other name may be anybody's file."""
    path = base / "firecracker" / id_of(base) / "root" / "firecracker"
    path.parent.mkdir(parents=True)
    other = base / "other"
    other.write_text("mine")
    if kind == "symbolic":
        path.symlink_to(other)
    elif kind == "hard":
        path.hardlink_to(other)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert _run(base) == (1, text.format(path=path))
    assert other.read_text() == "mine"
    assert other.stat().st_uid == os.getuid()
    assert os.listdir(path.parent) == ["firecracker"]


def test_the_program_file_is_in_the_jail(base: Path) -> None:
    """Also where an earlier launch has left one, whoever owns it by now."""
    with microvm(base) as jailed:
        path = jailed.root / "firecracker"
        jailed.root.mkdir(parents=True)
        path.write_bytes(b"x" * 10000)
        path.chmod(0o755)
        jailed.boot()
        assert path.read_bytes() == FIRECRACKER.read_bytes()
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (jailed.uid, jailed.gid, 0o755)
    with microvm(base, microvm_id=f"{id_of(base)}-fresh") as jailed:
        jailed.boot()
        status = (jailed.root / "firecracker").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (jailed.uid, jailed.gid, 0o755)


def test_same_id_twice(base: Path, no_leftovers: NoLeftovers) -> None:
    with microvm(base) as first:
        first.boot()
        with no_leftovers():
            code, printed = _run(base, "--cgroup", "pids.max=9", id=first.id)
        assert code == 1
        assert printed == "Failed to create /dev/net/tun via mknod inside the jail: File exists (os error 17)\n"
        assert first.api("GET", "/").status == 200
        assert not list(Path("/sys/fs/cgroup").glob(f"*/firecracker/{first.id}"))


def test_existing_pid_file(base: Path) -> None:
    with microvm(base, "--without", "devices") as jailed:
        jailed.root.mkdir(parents=True)
        jailed.pid_file.write_text("1")
        assert jailed.run() == 1
        assert jailed.output() == "Failed to open file /firecracker.pid: File exists (os error 17)\n"
        assert jailed.pid_file.read_text() == "1"


@pytest.mark.parametrize("options", [("--daemonize",), ("--new-pid-ns",), ("--daemonize", "--new-pid-ns")])
def test_late_errors_reach_the_client_of_a_detached_launch(base: Path, options: tuple[str, ...]) -> None:
    root = base / "firecracker" / id_of(base) / "root"
    (root / "dev").mkdir(parents=True)
    (root / "dev/kvm").touch()
    code, printed = _run(base, *options)
    assert (code, printed) == (1, "Failed to create /dev/kvm via mknod inside the jail: File exists (os error 17)\n")
    # What the failed launch made inside the jail is gone; what was there before is still there.
    assert sorted(os.listdir(root)) == ["dev"]
    assert os.listdir(root / "dev") == ["kvm"]


def test_links_in_an_old_jail_root_lead_nowhere(base: Path) -> None:
    outside = base.parent / "outside"
    outside.mkdir(mode=0o755)
    root = base / "firecracker" / id_of(base) / "root"
    root.mkdir(parents=True)
    (root / "run").symlink_to(outside)
    code, printed = _run(base)
    assert code == 1
    assert printed.startswith("Failed to change owner for /run")
    assert os.listdir(outside) == []
    assert outside.stat().st_uid == 0


def test_controller_that_fails_before_its_seal(base: Path) -> None:
    jailed = stand_in(base, "fail-early")
    assert jailed.run() == 7
    assert "stand-in: failing early" in jailed.output()


def test_arguments_of_firecracker_that_are_wrong(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(names=(id_of(base),)):
        code, printed = _run(base, "--", "--no-such-flag")
    assert code == 153
    assert printed.startswith("Arguments parsing error: Found argument 'no-such-flag'")


def test_version_of_firecracker_after_the_dashes(base: Path) -> None:
    words = [word for pair in GOOD.items() for word in pair]
    result = subprocess.run(
        [JAILER, *words, "--id", id_of(base), "--chroot-base-dir", base, "--", "--version"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.startswith("Firecracker v")
    assert os.listdir(base) == []
