"""Users of workers on an older kernel (6.1, cgroup v2 only, root with every capability), and where none can be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailer.steps.user_namespace import FIRST_UID
from tests.harness.attacks import outcomes
from tests.harness.jail import UID, id_of, microvm, status, wait_for

ALL = ("supervisor", "vmm", "vcpu 0")
BARE = ("seccomp", "landlock", "pid-namespace", "dumpable")
SYSCTL = Path("/proc/sys/user/max_user_namespaces")
ATTEMPTS = ("ptrace", "process-vm-readv", "pidfd-getfd", "pidfd-send-signal", "kill", "tgkill", "prlimit")


@pytest.mark.parametrize(("off", "expected"), [((), "EPERM"), (("cell-identity",), "open")])
def test_a_worker_attacks_its_controller(base: Path, off: tuple[str, ...], expected: str) -> None:
    options = [word for wall in (*BARE, *off) for word in ("--without", wall)]
    drills = [word for each in ATTEMPTS for word in ("--drill", each)]
    with microvm(base, *drills, *options) as jailed:
        jailed.start()

        def all_of_them() -> dict[str, str] | None:
            found = outcomes(jailed.output())
            return found if set(found) >= set(ATTEMPTS) else None

        assert wait_for(all_of_them, jailed.describe) == dict.fromkeys(ATTEMPTS, expected)


def test_a_host_without_user_namespaces_has_one_user_and_says_so(base: Path) -> None:
    allowed = SYSCTL.read_text()
    reason = "no user namespace can be made: No space left on device (os error 28)"
    try:
        SYSCTL.write_text("0")
        with microvm(base, microvm_id=id_of(base, "without")) as jailed:
            jailed.boot()
            cells = jailed.wait_cells(*ALL)
            assert {status(pid)["Uid"].split()[0] for pid in cells.values()} == {str(UID)}
            assert jailed.wall_records()["vcpu 0"]["unavailable"] == {"cell-identity": reason}
            assert f"cell-identity cannot be had: {reason}" in jailed.log()
        with microvm(base, "--cell-uids", "1280000", microvm_id=id_of(base, "asked")) as jailed:
            assert jailed.run() == 1
            assert f"--cell-uids 1280000: {reason}" in jailed.output()
    finally:
        SYSCTL.write_text(allowed)
    with microvm(base) as jailed:
        jailed.boot()
        assert int(status(jailed.wait_cells(*ALL)["vcpu 0"])["Uid"].split()[0]) >= FIRST_UID
