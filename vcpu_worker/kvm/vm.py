"""A KVM VM: memory slots, interrupt routes, irqfds and doorbells."""

from __future__ import annotations

import os

from base.lean_typing import Iterable, Mapping, NamedTuple
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.ioctl import ioctl_buffer, ioctl_integer, ioctl_pointer
from vcpu_worker.kvm.system import KvmSystem

#: Pins of the IOAPIC in the controller; KVM reserves as many routes for it.
IOAPIC_PINS = 24
#: Three pages that VMX needs for real-mode guests (KVM_SET_TSS_ADDR, Documentation/virt/kvm/api.rst), where no device
#: and no memory is (docs/formats/guest-memory.md); the identity map page lies right below.
TSS_ADDRESS = 0xFFFB_D000
IDENTITY_MAP_ADDRESS = TSS_ADDRESS - 0x1000


class MsiRoute(NamedTuple):
    """Where a GSI leads: an MSI of ``data`` (32 bits) to ``address`` (64 bits, x2APIC ids in the upper half)."""

    address: int
    data: int


class KvmVm:
    """One VM with a split irqchip: local APICs in the kernel, IOAPIC in the controller, no PIC and no PIT."""

    def __init__(self, system: KvmSystem) -> None:
        self.system = system
        self.descriptor = system.create_vm()
        self._routes: dict[int, MsiRoute] = {}
        self._irqfds: dict[int, int] = {}
        try:
            self.enable(abi.KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)
            self.enable(abi.KVM_CAP_X2APIC_API, abi.X2APIC_API_USE_32BIT_IDS | abi.X2APIC_API_DISABLE_BROADCAST_QUIRK)
            ioctl_pointer(self.descriptor, abi.KVM_SET_TSS_ADDR, TSS_ADDRESS)
            ioctl_buffer(
                self.descriptor, abi.KVM_SET_IDENTITY_MAP_ADDR, bytearray(IDENTITY_MAP_ADDRESS.to_bytes(8, "little"))
            )
        except BaseException:
            os.close(self.descriptor)
            raise

    def enable(self, capability: int, argument: int = 0) -> None:
        """KVM_ENABLE_CAP with one argument."""
        ioctl_buffer(
            self.descriptor, abi.KVM_ENABLE_CAP, bytearray(abi.ENABLE_CAP.pack(capability, 0, argument, 0, 0, 0))
        )

    def extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION asked of the VM (some answers differ from those of /dev/kvm)."""
        return ioctl_integer(self.descriptor, abi.KVM_CHECK_EXTENSION, capability)

    def create_vcpu(self, index: int) -> int:
        """Return the descriptor of a new vCPU with APIC id ``index``."""
        return ioctl_integer(self.descriptor, abi.KVM_CREATE_VCPU, index)

    # ------------------------------------------------------------ memory

    def set_memory_region(self, slot: int, guest_address: int, size: int, host_address: int, flags: int = 0) -> None:
        """Back ``size`` bytes of guest physical memory by our mapping at ``host_address``; size 0 removes the slot."""
        ioctl_buffer(
            self.descriptor,
            abi.KVM_SET_USER_MEMORY_REGION,
            bytearray(abi.USERSPACE_MEMORY_REGION.pack(slot, flags, guest_address, size, host_address)),
        )

    def get_clock(self) -> bytes:
        """struct kvm_clock_data."""
        buffer = bytearray(abi.CLOCK_SIZE)
        ioctl_buffer(self.descriptor, abi.KVM_GET_CLOCK, buffer)
        return bytes(buffer)

    def set_clock(self, clock: int, realtime: int = 0, flags: int = 0) -> None:
        """KVM_SET_CLOCK: kvmclock in ns; with CLOCK_REALTIME in ``flags`` it was that at ``realtime``."""
        ioctl_buffer(self.descriptor, abi.KVM_SET_CLOCK, bytearray(abi.CLOCK_DATA.pack(clock, flags, 0, realtime, 0)))

    # ------------------------------------------------------------ interrupts

    @property
    def routes(self) -> Mapping[int, MsiRoute]:
        """The routes in force."""
        return self._routes

    def set_routes(self, routes: Mapping[int, MsiRoute]) -> None:
        """Replace the whole GSI routing table (the kernel knows no smaller step)."""
        if routes == self._routes:
            return
        buffer = bytearray(abi.IRQ_ROUTING_HEADER.pack(len(routes), 0))
        for gsi, (address, data) in sorted(routes.items()):
            buffer += abi.IRQ_ROUTING_ENTRY_MSI.pack(
                gsi, abi.IRQ_ROUTING_MSI, 0, 0, address & 0xFFFF_FFFF, address >> 32, data, 0
            )
        ioctl_buffer(self.descriptor, abi.KVM_SET_GSI_ROUTING, buffer)
        self._routes = dict(routes)

    def assign_irqfd(self, gsi: int, eventfd: int) -> None:
        """Let ``eventfd`` raise ``gsi``. A count that is already in the eventfd is injected at once. Idempotent."""
        if self._irqfds.get(gsi) == eventfd:
            return
        ioctl_buffer(self.descriptor, abi.KVM_IRQFD, bytearray(abi.IRQFD.pack(eventfd, gsi, 0, 0)))
        self._irqfds[gsi] = eventfd

    def deassign_irqfd(self, gsi: int) -> None:
        """Take the eventfd of ``gsi`` away; what is signalled from now on stays in the eventfd. Idempotent."""
        eventfd = self._irqfds.get(gsi)
        if eventfd is None:
            return
        ioctl_buffer(
            self.descriptor, abi.KVM_IRQFD, bytearray(abi.IRQFD.pack(eventfd, gsi, abi.IRQFD_FLAG_DEASSIGN, 0))
        )
        del self._irqfds[gsi]

    def assigned_irqfds(self) -> Iterable[int]:
        """GSIs that have an irqfd now."""
        return tuple(self._irqfds)

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver one MSI now; False when no vCPU of this VM took it."""
        message = abi.MSI.pack(address & 0xFFFF_FFFF, address >> 32, data, 0, 0)
        return ioctl_buffer(self.descriptor, abi.KVM_SIGNAL_MSI, bytearray(message)) > 0

    def assign_ioeventfd(
        self,
        eventfd: int,
        address: int,
        length: int,
        datamatch: int | None,
        *,
        port: bool = False,
        remove: bool = False,
    ) -> None:
        """Turn guest writes of ``length`` bytes to an MMIO address or a port into eventfd signals, without an exit."""
        flags = (
            (abi.IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0)
            | (abi.IOEVENTFD_FLAG_PIO if port else 0)
            | (abi.IOEVENTFD_FLAG_DEASSIGN if remove else 0)
        )
        request = abi.IOEVENTFD.pack(datamatch or 0, address, length, eventfd, flags)
        ioctl_buffer(self.descriptor, abi.KVM_IOEVENTFD, bytearray(request))

    def close(self) -> None:
        """Close the VM's descriptor. The VM itself ends with its vCPUs' descriptors and mappings."""
        os.close(self.descriptor)
