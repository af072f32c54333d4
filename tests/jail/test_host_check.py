"""jailer --check and cellblock check on this host: one report under two names, and it is true."""

from __future__ import annotations

import subprocess

from devtool.project import LAUNCHERS


def report(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(LAUNCHERS / command[0]), *command[1:]], capture_output=True, text=True, check=False, timeout=120
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_both_programs_say_the_same_and_this_host_can_run_jails() -> None:
    status, text = report("cellblock", "check")
    assert (status, text) == report("jailer", "--check")
    assert status == 0, text  # these tests launch jails here
    assert text.endswith("This host can run jailed microVMs.\n")
    assert "     ok  kvm: /dev/kvm makes VMs, API version 12\n" in text
