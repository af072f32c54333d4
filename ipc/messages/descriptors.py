"""Controller → worker, over an inherited socket pair: what the descriptors are that come along."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_MEMORY_BYTES
from ipc.messages.records import MAX_GSI, VCPU_FIELD, VECTOR_FIELD
from ipc.messages.vm import DOORBELL_FIELD, SLOT_FIELD
from ipc.schema import Int, Schema

DESCRIPTORS = Schema()


class GuestMemory(NamedTuple):
    """With one descriptor: the guest memory memfd of ``size`` bytes."""

    size: int


class DevicePages(NamedTuple):
    """With one descriptor: the device page."""


class ExitRing(NamedTuple):
    """With three descriptors: ring memfd, doorbell eventfd, completion eventfd of this vCPU."""

    vcpu: int


class Interrupt(NamedTuple):
    """With one descriptor: the eventfd of this GSI."""

    gsi: int


class VcpuDescriptor(NamedTuple):
    """Worker → controller, once per vCPU before Configured: with the vCPU's descriptor, to map kvm_run read-only."""

    vcpu: int


DESCRIPTORS.register(1, GuestMemory, size=Int(MAX_MEMORY_BYTES, 1))
DESCRIPTORS.register(2, DevicePages)
DESCRIPTORS.register(3, ExitRing, vcpu=VCPU_FIELD)
DESCRIPTORS.register(4, Interrupt, gsi=Int(MAX_GSI - 1))


class IpiPath(NamedTuple):
    """With one descriptor: the eventfd of what is sent to this vCPU with this vector (OpenIpiTarget, OpenIpiSource)."""

    vcpu: int
    vector: int


class ExternalInterrupt(NamedTuple):
    """With one descriptor: the eventfd that is signalled when INTR of the 8259s rises. To the worker of vCPU 0."""


class MemoryObject(NamedTuple):
    """With one descriptor: the memfd of ``size`` bytes behind this memory slot (MapMemory)."""

    slot: int
    size: int


class DoorbellEvent(NamedTuple):
    """With one descriptor: the eventfd of this doorbell (AddDoorbell)."""

    doorbell: int


DESCRIPTORS.register(5, VcpuDescriptor, vcpu=VCPU_FIELD)
DESCRIPTORS.register(6, IpiPath, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
DESCRIPTORS.register(7, ExternalInterrupt)
DESCRIPTORS.register(8, MemoryObject, slot=SLOT_FIELD, size=Int(MAX_MEMORY_BYTES, 1))
DESCRIPTORS.register(9, DoorbellEvent, doorbell=DOORBELL_FIELD)
