"""A KVM vCPU: its descriptor, its shared page (kvm_run), and access to every part of its state.

Every ioctl here waits while another thread runs the vCPU; therefore only the thread that runs it may call them.
State is passed as the kernel's own structures (bytes); ``abi`` names their offsets.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from base.lean_typing import Iterable, Sequence
from ipc.messages.records import CpuidEntry, MsrValue
from vcpu_worker.errors import KvmError, MsrError
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.ioctl import ioctl_buffer, ioctl_integer
from vcpu_worker.kvm.system import EINTR, pack_cpuid, unpack_cpuid
from vcpu_worker.kvm.vm import KvmVm

#: DR7: breakpoint 0 is on, for execution (its type and length bits are zero); bit 10 is always set.
_BREAK_ON_EXECUTION = 0x402


class KvmVcpu:
    """One vCPU and its mapped kvm_run page, seen as bytes, 32-bit and 64-bit words."""

    def __init__(self, vm: KvmVm, index: int, mmap_size: int) -> None:
        self.vm = vm  # the guest's memory is mapped as long as the VM object lives
        self.index = index
        self.descriptor = vm.create_vcpu(index)
        try:
            self.mapping = mmap.mmap(self.descriptor, mmap_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.run8 = memoryview(self.mapping)
        self.run16 = self.run8.cast("H")
        self.run32 = self.run8.cast("I")
        self.run64 = self.run8.cast("Q")
        self._xsave_size = max(abi.XSAVE_SIZE, vm.extension(abi.KVM_CAP_XSAVE2))
        self._has_sregs2 = bool(vm.extension(abi.KVM_CAP_SREGS2))
        self._has_tsc_offset = bool(vm.extension(abi.KVM_CAP_VCPU_ATTRIBUTES))

    def touch(self) -> None:
        """Enter KVM_RUN and leave it before the guest runs, so that KVM makes what it makes at the first KVM_RUN.

        Since Linux 6.13 that includes a thread of this process (kvm-nx-lpage-recovery), which a sealed worker may not
        get any more: with RLIMIT_NPROC 0 KVM_RUN would fail with EAGAIN for ever. Raises KvmError.
        """
        self.run8[abi.RUN_IMMEDIATE_EXIT] = 1
        try:
            ioctl_integer(self.descriptor, abi.KVM_RUN)
        except KvmError as error:
            if error.errno != EINTR:
                raise
        finally:
            self.run8[abi.RUN_IMMEDIATE_EXIT] = 0

    # ------------------------------------------------------------ fixed-size structures

    def _get(self, request: int, size: int) -> bytes:
        buffer = bytearray(size)
        ioctl_buffer(self.descriptor, request, buffer)
        return bytes(buffer)

    def _set(self, request: int, value: bytes | bytearray, size: int) -> None:
        if len(value) != size:
            raise ValueError(f"{abi.request_name(request)} takes {size} bytes, not {len(value)}")
        ioctl_buffer(self.descriptor, request, bytearray(value))

    def get_regs(self) -> bytes:
        """struct kvm_regs."""
        return self._get(abi.KVM_GET_REGS, abi.REGS_SIZE)

    def set_regs(self, value: bytes) -> None:
        """struct kvm_regs."""
        self._set(abi.KVM_SET_REGS, value, abi.REGS_SIZE)

    def get_sregs(self) -> bytes:
        """struct kvm_sregs."""
        return self._get(abi.KVM_GET_SREGS, abi.SREGS_SIZE)

    def set_sregs(self, value: bytes) -> None:
        """struct kvm_sregs."""
        self._set(abi.KVM_SET_SREGS, value, abi.SREGS_SIZE)

    @property
    def has_sregs2(self) -> bool:
        """Whether the host has struct kvm_sregs2, which carries the PDPTRs of PAE guests."""
        return self._has_sregs2

    def get_sregs2(self) -> bytes:
        """struct kvm_sregs2."""
        return self._get(abi.KVM_GET_SREGS2, abi.SREGS2_SIZE)

    def set_sregs2(self, value: bytes) -> None:
        """struct kvm_sregs2."""
        self._set(abi.KVM_SET_SREGS2, value, abi.SREGS2_SIZE)

    def get_fpu(self) -> bytes:
        """struct kvm_fpu."""
        return self._get(abi.KVM_GET_FPU, abi.FPU_SIZE)

    def set_fpu(self, value: bytes) -> None:
        """struct kvm_fpu."""
        self._set(abi.KVM_SET_FPU, value, abi.FPU_SIZE)

    def get_lapic(self) -> bytes:
        """struct kvm_lapic_state: the register page of the local APIC."""
        return self._get(abi.KVM_GET_LAPIC, abi.LAPIC_SIZE)

    def set_lapic(self, value: bytes | bytearray) -> None:
        """struct kvm_lapic_state. What it has requested is delivered.

        KVM before Linux 6.13 without APICv takes the IRR over, but remembers that nothing is pending
        (kvm_lapic.irr_pending), until the next interrupt comes: a halted vCPU is never woken. So one of the vectors is
        requested once more, which changes nothing else.
        """
        self._set(abi.KVM_SET_LAPIC, value, abi.LAPIC_SIZE)
        if requested := abi.apic_vectors(value, abi.APIC_IRR):
            self.vm.signal_msi(abi.MSI_ADDRESS_BASE | self.index << abi.MSI_DESTINATION_SHIFT, requested[-1])

    def get_mp_state(self) -> int:
        """MP_STATE_*."""
        (state,) = abi.MP_STATE.unpack(self._get(abi.KVM_GET_MP_STATE, abi.MP_STATE_SIZE))
        return int(state)

    def set_mp_state(self, state: int) -> None:
        """MP_STATE_*."""
        self._set(abi.KVM_SET_MP_STATE, abi.MP_STATE.pack(state), abi.MP_STATE_SIZE)

    def get_events(self) -> bytes:
        """struct kvm_vcpu_events."""
        return self._get(abi.KVM_GET_VCPU_EVENTS, abi.VCPU_EVENTS_SIZE)

    def set_events(self, value: bytes | bytearray) -> None:
        """struct kvm_vcpu_events."""
        self._set(abi.KVM_SET_VCPU_EVENTS, value, abi.VCPU_EVENTS_SIZE)

    def inject_interrupt(self, vector: int) -> None:
        """Let the vCPU take an external interrupt before its next instruction; only when it can (the kvm_run page says
        so) and no exit is open.

        Not by KVM_INTERRUPT: what that leaves with KVM until the vCPU runs is part of no state that can be read, so
        that it would be lost if the vCPU were saved before (kvm_vcpu_arch.pending_external_vector, Linux 6.1).
        """
        events = bytearray(self.get_events())
        events[abi.EVENTS_INTERRUPT_INJECTED] = 1
        events[abi.EVENTS_INTERRUPT_NR] = vector
        events[abi.EVENTS_INTERRUPT_SOFT] = 0
        self.set_events(events)
        if self.get_mp_state() == abi.MP_STATE_HALTED:
            self.set_mp_state(abi.MP_STATE_RUNNABLE)

    def get_debugregs(self) -> bytes:
        """struct kvm_debugregs."""
        return self._get(abi.KVM_GET_DEBUGREGS, abi.DEBUGREGS_SIZE)

    def set_debugregs(self, value: bytes) -> None:
        """struct kvm_debugregs."""
        self._set(abi.KVM_SET_DEBUGREGS, value, abi.DEBUGREGS_SIZE)

    def get_xcrs(self) -> bytes:
        """struct kvm_xcrs."""
        return self._get(abi.KVM_GET_XCRS, abi.XCRS_SIZE)

    def set_xcrs(self, value: bytes) -> None:
        """struct kvm_xcrs."""
        self._set(abi.KVM_SET_XCRS, value, abi.XCRS_SIZE)

    def get_xsave(self) -> bytes:
        """The XSAVE area; longer than 4096 bytes where the guest may use dynamic features (KVM_CAP_XSAVE2)."""
        if self._xsave_size > abi.XSAVE_SIZE:
            return self._get(abi.KVM_GET_XSAVE2, self._xsave_size)
        return self._get(abi.KVM_GET_XSAVE, abi.XSAVE_SIZE)

    def set_xsave(self, value: bytes) -> None:
        """The XSAVE area as get_xsave returned it."""
        self._set(abi.KVM_SET_XSAVE, value, self._xsave_size)

    def set_guest_debug(self, control: int, breakpoint: int | None = None) -> None:
        """KVM_SET_GUEST_DEBUG; ``breakpoint`` is a linear address where execution stops before the instruction."""
        registers = [0] * 8
        if breakpoint is not None:
            control |= abi.GUESTDBG_USE_HW_BP
            registers[0], registers[7] = breakpoint, _BREAK_ON_EXECUTION
        value = abi.GUEST_DEBUG.pack(control, 0, *registers)
        self._set(abi.KVM_SET_GUEST_DEBUG, value, abi.GUEST_DEBUG_SIZE)

    # ------------------------------------------------------------ CPUID, MSRs

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2; before the first KVM_RUN."""
        ioctl_buffer(self.descriptor, abi.KVM_SET_CPUID2, pack_cpuid(list(entries)))

    def get_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2: what the guest sees."""
        buffer = bytearray(abi.CPUID2_HEADER.size + abi.MAX_CPUID_ENTRIES * abi.CPUID_ENTRY2.size)
        abi.CPUID2_HEADER.pack_into(buffer, 0, abi.MAX_CPUID_ENTRIES, 0)
        ioctl_buffer(self.descriptor, abi.KVM_GET_CPUID2, buffer)
        return unpack_cpuid(buffer)

    def _get_msr_run(self, indices: Sequence[int]) -> list[MsrValue]:
        """KVM_GET_MSRS of at most MAX_IO_MSRS indices; ends before the first one that cannot be read."""
        buffer = bytearray(abi.MSRS_HEADER.pack(len(indices), 0))
        for index in indices:
            buffer += abi.MSR_ENTRY.pack(index, 0, 0)
        count = ioctl_buffer(self.descriptor, abi.KVM_GET_MSRS, buffer)
        values = []
        for number in range(count):
            index, _, value = abi.MSR_ENTRY.unpack_from(buffer, abi.MSRS_HEADER.size + number * abi.MSR_ENTRY.size)
            values.append(MsrValue(index, value))
        return values

    def get_msrs(self, indices: Sequence[int]) -> list[MsrValue]:
        """Read MSRs; those that this vCPU does not have (its CPUID says so) are left out."""
        values: list[MsrValue] = []
        position = 0
        while position < len(indices):
            part = indices[position : position + abi.MAX_IO_MSRS]
            read = self._get_msr_run(part)
            values += read
            position += len(read) + (1 if len(read) < len(part) else 0)
        return values

    def set_msrs(self, values: Sequence[MsrValue]) -> None:
        """Write MSRs, all of them. Raises MsrError that names the first one the kernel refuses."""
        for first in range(0, len(values), abi.MAX_IO_MSRS):
            part = values[first : first + abi.MAX_IO_MSRS]
            buffer = bytearray(abi.MSRS_HEADER.pack(len(part), 0))
            for msr in part:
                buffer += abi.MSR_ENTRY.pack(msr.register, 0, msr.value)
            count = ioctl_buffer(self.descriptor, abi.KVM_SET_MSRS, buffer)
            if count < len(part):
                refused = part[count]
                raise MsrError(f"the host refuses MSR {refused.register:#x} = {refused.value:#x}")

    # ------------------------------------------------------------ time

    def tsc_khz(self) -> int:
        """Frequency of the guest's TSC in kHz."""
        return ioctl_integer(self.descriptor, abi.KVM_GET_TSC_KHZ)

    def get_tsc_offset(self) -> int | None:
        """Guest TSC minus host TSC (unsigned 64 bits); None where the host cannot tell (before Linux 5.16)."""
        if not self._has_tsc_offset:
            return None
        value = bytearray(8)
        self._tsc_attribute(abi.KVM_GET_DEVICE_ATTR, value)
        return int.from_bytes(value, "little")

    def set_tsc_offset(self, offset: int) -> None:
        """Set guest TSC minus host TSC (unsigned 64 bits). Raises KvmError where the host cannot."""
        self._tsc_attribute(abi.KVM_SET_DEVICE_ATTR, bytearray(offset.to_bytes(8, "little")))

    def _tsc_attribute(self, request: int, value: bytearray) -> None:
        first = ctypes.c_char.from_buffer(value)
        attribute = abi.DEVICE_ATTR.pack(0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, ctypes.addressof(first))
        ioctl_buffer(self.descriptor, request, bytearray(attribute))

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest's watchdogs that it was stopped by the host; False if the guest uses no kvm-clock."""
        try:
            ioctl_integer(self.descriptor, abi.KVM_KVMCLOCK_CTRL)
        except KvmError:
            return False
        return True

    def close(self) -> None:
        """Release the page and close the descriptor."""
        for view in (self.run64, self.run32, self.run16, self.run8):
            view.release()
        self.mapping.close()
        os.close(self.descriptor)
