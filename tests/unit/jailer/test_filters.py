"""Which filters a launch loads."""

from __future__ import annotations

import pytest

from ipc.launch_plan import ROLE_DEVICE, ROLE_SUPERVISOR, ROLE_VCPU, ROLE_VMM, SECCOMP_KILL, SECCOMP_OFF, SECCOMP_REPORT
from jailer.filters import JANITOR, RUNNING, SETUP, Filters, load_filters, of_cell

ROLES = {ROLE_SUPERVISOR, "vmm-setup", ROLE_VMM, "vcpu-setup", ROLE_VCPU, "device-setup", ROLE_DEVICE}


def test_without_seccomp_there_is_none() -> None:
    assert load_filters(SECCOMP_OFF) == Filters(SECCOMP_OFF, {}, "")


@pytest.mark.parametrize("mode", [SECCOMP_KILL, SECCOMP_REPORT, "errno=133"])
def test_every_role_has_one_and_so_has_the_janitor(mode: str) -> None:
    filters = load_filters(mode)
    assert filters.mode == mode
    assert set(filters.by_role) == ROLES | {JANITOR}


def test_a_cell_has_one_for_each_stage() -> None:
    by_role = load_filters(SECCOMP_KILL).by_role
    for role in (ROLE_VMM, ROLE_VCPU, ROLE_DEVICE):
        assert of_cell(by_role, role) == {SETUP: by_role[f"{role}-setup"], RUNNING: by_role[role]}
        assert of_cell({}, role) == {}


def test_faults_get_filters_that_let_them_act() -> None:
    plain, with_faults = (load_filters(SECCOMP_KILL, with_faults=faults) for faults in (False, True))
    assert plain.by_role[ROLE_VCPU] != with_faults.by_role[ROLE_VCPU]
