"""What KvmVcpu does beside its ioctls."""

from __future__ import annotations

import pytest

from vcpu_worker.kvm import abi, vcpu
from vcpu_worker.kvm.vm import KvmVm


class Vm(KvmVm):
    def __init__(self) -> None:
        self.signalled: list[tuple[int, int]] = []

    def signal_msi(self, address: int, data: int) -> bool:
        self.signalled.append((address, data))
        return True


@pytest.mark.parametrize(
    ("requested", "signalled"), [((), []), ((3,), []), ((251, 64), [251]), ((32,), [32]), ((31, 5), [31])]
)
def test_what_a_loaded_lapic_has_requested_is_requested_once_more(monkeypatch, requested, signalled):
    """KVM before 6.13 forgets otherwise that something is pending: a halted vCPU slept on for ever."""
    ioctls = []
    monkeypatch.setattr(vcpu, "ioctl_buffer", lambda descriptor, request, buffer: ioctls.append(request))
    made = object.__new__(vcpu.KvmVcpu)
    vm = Vm()
    made.vm, made.index, made.descriptor = vm, 5, -1
    lapic = bytearray(abi.LAPIC_SIZE)
    for vector in requested:
        lapic[abi.APIC_IRR + (vector >> 5) * 16 + (vector >> 3 & 3)] |= 1 << (vector & 7)
    made.set_lapic(lapic)
    assert ioctls == [abi.KVM_SET_LAPIC]
    assert vm.signalled == [(0xFEE0_5000, vector) for vector in signalled]
