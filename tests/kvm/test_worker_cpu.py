"""A real worker on /dev/kvm takes what a CPU template comes to: CPUID, MSRs, capabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipc.messages.records import CapabilityDemand, CpuidEntry, Failed, MsrChange
from ipc.messages.worker import (
    Configure,
    DumpCpuConfig,
    DumpedCpuConfig,
    HostCpuRead,
    ReadHostCpu,
    SavedState,
    SaveState,
)
from tests.harness.workers import ChecksCounts, Controller
from vcpu_worker import state as vcpu_state
from vcpu_worker.kvm import abi

CONFIG_ERROR = "System configuration error: Failed to create guest config: "
MISC_ENABLE = 0x1A0
PAT = 0x277
#: LAHF to PREFETCHW. Not in leaf 1, 7 or 0xD: there a KVM that runs guests without hardware help puts the processor's
#: own features back, as it cannot intercept the instruction.
HIDDEN = 0x1FF
TOPOLOGY_EXTENSIONS = 1 << 22
FEATURES = (0x8000_0001, 0)
HOST_DATA = ((0, 0), (0x8000_0006, 0))
NO_CAPABILITY = 0x7FFF_FFFF


def by_leaf(entries: tuple[CpuidEntry, ...]) -> dict[tuple[int, int], CpuidEntry]:
    return {(each.leaf, each.subleaf): each for each in entries}


def configure(worker: Controller, **changes: Any) -> Any:
    worker.greet()
    worker.prepare()
    return worker.collect(worker.submit(worker.configuration()._replace(**changes)))


def test_a_template_reaches_cpuid_and_msrs(tmp_path: Path):
    with Controller(tmp_path, ChecksCounts()) as worker:
        worker.greet()
        host = worker.request(ReadHostCpu(), HostCpuRead).cpuid
        features = by_leaf(host)[FEATURES]
        changes = {
            FEATURES: features._replace(ecx=features.ecx & ~HIDDEN),
            **{key: by_leaf(host)[key]._replace(ecx=0x1234_5678) for key in HOST_DATA},
        }
        worker.prepare()
        pattern = 0x0007_0406_0007_0400
        message: Configure = worker.configuration()._replace(
            cpuid=tuple(changes.get((each.leaf, each.subleaf), each) for each in host),
            msr_changes=(MsrChange(PAT, 0xFF00, pattern & 0xFF00), MsrChange(MISC_ENABLE, (1 << 64) - 1, 0)),
            capabilities=(
                CapabilityDemand(abi.KVM_CAP_XSAVE, required=True),
                CapabilityDemand(NO_CAPABILITY, required=False),
            ),
        )
        reply = worker.collect(worker.submit(message))
        assert not isinstance(reply, Failed), reply
        dump = worker.request(DumpCpuConfig(0), DumpedCpuConfig)
        seen = by_leaf(dump.cpuid)
        assert features.ecx & HIDDEN, "the test needs a host that has some of these features"
        assert seen[FEATURES].ecx & ~TOPOLOGY_EXTENSIONS == features.ecx & ~HIDDEN & ~TOPOLOGY_EXTENSIONS
        for key in HOST_DATA:
            assert seen[key] == by_leaf(host)[key], "not a template's to change"
        msrs = dict(dump.msrs)
        assert msrs[PAT] == 0x0007_0406_0007_0406 & ~0xFF00 | pattern & 0xFF00
        assert msrs[MISC_ENABLE] & 1 == 1, "what every kernel expects at boot comes last"
        saved = vcpu_state.decode(worker.request(SaveState(0), SavedState).state)
        assert dict(saved.msrs)[PAT] == msrs[PAT]
        assert set(dump.cpuid) == set(saved.cpuid)
        assert worker.finish() == 0


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        (
            {"msr_changes": (MsrChange(PAT, 0, 0), MsrChange(0x1234_5678, 1, 1))},
            "worker.template",
            CONFIG_ERROR + "Template changes an MSR entry not supported by KVM: Register Address: 12345678",
        ),
        (
            {"capabilities": (CapabilityDemand(NO_CAPABILITY, required=True),)},
            "worker.capability",
            "Kvm error: Missing KVM capabilities: 0x7fffffff",
        ),
        (
            {"capabilities": (CapabilityDemand(0xFFFF_FFFF, required=True),)},
            "worker.capability",
            "Kvm error: Missing KVM capabilities: 0xffffffff",
        ),
    ],
)
def test_what_the_host_does_not_have_is_refused(tmp_path: Path, changes: dict[str, Any], code: str, text: str):
    with Controller(tmp_path, ChecksCounts()) as worker:
        assert configure(worker, **changes) == Failed(code, text)
        assert worker.finish() == 0


def test_a_capability_that_is_missing_can_be_waived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The check names what is missing, as long as the template does not say that it may be."""
    from vcpu_worker.kvm import system

    absent = ("KVM_CAP_THAT_NO_KERNEL_HAS", NO_CAPABILITY)
    monkeypatch.setattr(system, "REQUIRED_CAPABILITIES", (*system.REQUIRED_CAPABILITIES, absent))
    with Controller(tmp_path, ChecksCounts()) as worker:
        text = "Kvm error: Missing KVM capabilities: 0x7fffffff (KVM_CAP_THAT_NO_KERNEL_HAS)"
        assert configure(worker) == Failed("worker.capability", text)
    (tmp_path / "second").mkdir()
    with Controller(tmp_path / "second", ChecksCounts()) as worker:
        waived = (CapabilityDemand(NO_CAPABILITY, required=False),)
        reply = configure(worker, capabilities=waived)
        assert not isinstance(reply, Failed), reply
        assert worker.finish() == 0
