"""Host CPUs of vCPUs: what is read, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.launch_plan import MAX_HOST_CPUS, Assignment
from vmm.config.machine import MachineConfigError, MachineConfigUpdate
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions
from vmm.placement import AffinityError, cpulist, decide, parse_affinity


@pytest.mark.parametrize(
    ("text", "vcpus", "affinity"),
    [
        (None, 2, ()),
        ("Any", 2, ()),
        ("3", 1, ((3,),)),
        ("1/0", 2, ((1,), (0,))),
        ("2/3/4-5,7/7,4-5,5", 4, ((2,), (3,), (4, 5, 7), (4, 5, 7))),
        ("8190-8191", 1, ((8190, 8191),)),
        ("1-1024", 1, (tuple(range(1, 1025)),)),
    ],
)
def test_what_is_read(text, vcpus, affinity):
    assert parse_affinity(text, vcpus) == affinity


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list of host CPUs for each of the 2 vCPUs, such as 0/1"),
        ("0", "a list of host CPUs for each of the 2 vCPUs"),
        ("0/1/2", "a list of host CPUs for each of the 2 vCPUs"),
        ("any", "a list of host CPUs for each of the 2 vCPUs"),
        ("0/", "vCPU 1 are a list such as 2,4-5; this is none: ''"),
        ("0,/1", "vCPU 0 are a list"),
        ("0/a", "vCPU 1 are a list"),
        ("-1/1", "vCPU 0 are a list"),
        ("1-/1", "vCPU 0 are a list"),
        ("1-2-3/1", "vCPU 0 are a list"),
        ("\u0663/1", "vCPU 0 are a list"),
        ("2-1/1", "2-1 is no range of numbers below 8192, lowest first"),
        ("0/8192", "8192 is no range"),
        ("0/" + "1," * 3000 + "1", "a list of host CPUs for each"),
        ("0/0-1024", "vCPU 1 are more than 1024"),
        ("0/4-6", "names host CPU 4-6; this microVM may use 0-3,7"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(AffinityError, match=said):
        parse_affinity(text, 2, (0, 1, 2, 3, 7))


@given(st.text(alphabet="0123456789,-/ a\u0661", max_size=40), st.integers(1, 32))
def test_any_text_is_read_or_refused(text, vcpus):
    try:
        affinity = parse_affinity(text, vcpus)
    except AffinityError:
        return
    assert len(affinity) == vcpus
    assert all(cpus == tuple(sorted(set(cpus))) and 0 <= cpus[0] <= cpus[-1] < MAX_HOST_CPUS for cpus in affinity)


@given(st.lists(st.sets(st.integers(0, MAX_HOST_CPUS - 1), min_size=1, max_size=20), min_size=1, max_size=32))
def test_what_is_written_is_read(wanted):
    affinity = tuple(tuple(sorted(cpus)) for cpus in wanted)
    assert parse_affinity("/".join(map(cpulist, affinity)), len(wanted)) == affinity


def test_each_worker_gets_the_cpus_of_its_vcpus():
    placement = decide("0,2/1", 3, cast(Any, SimpleNamespace()), ((0,), (1, 2), (3,)))
    assert placement.assignment(0) == Assignment(0, (0, 2), (1,), ((0,), (3,)))
    assert placement.assignment(1) == Assignment(1, (1,), (0, 2), ((1, 2),))


def test_a_refused_affinity_changes_nothing_and_any_takes_it_away():
    resources = VmResources(StartOptions(host_cpus=(0, 1)))
    resources.update_machine_config(MachineConfigUpdate(vcpu_count=2, vcpu_affinity="1/0-1"))
    for update in (
        MachineConfigUpdate(vcpu_affinity="1/2", mem_size_mib=256),
        MachineConfigUpdate(vcpu_count=4),
    ):
        with pytest.raises(MachineConfigError, match="vCPU affinity"):
            resources.update_machine_config(update)
    assert list(resources.machine_config.affinity) == [(1,), (0, 1)]
    assert resources.machine_config.to_json()["vcpu_affinity"] == "1/0-1"
    resources.update_machine_config(MachineConfigUpdate(vcpu_affinity="Any"))
    assert not resources.machine_config.affinity
    assert "vcpu_affinity" not in resources.machine_config.to_json()
