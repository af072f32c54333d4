"""Descriptors that the controller sent ahead of a command, by what they are for."""

from __future__ import annotations

import os

from ipc.channel import PairChannel
from ipc.errors import ChannelError
from ipc.messages.descriptors import (
    DevicePages,
    DoorbellEvent,
    ExitRing,
    ExternalInterrupt,
    GuestMemory,
    Interrupt,
    IpiPath,
    MemoryObject,
    VcpuDescriptor,
)
from vcpu_worker.errors import ConfigurationError

#: An exit ring comes with its doorbell and its completion eventfd.
_RING_DESCRIPTORS = 3
#: More than any commands under way can need: memory, page, 32 rings, and what is added to the VM.
_MAX_HELD = 128


class DescriptorSet:
    """Owns what was received until it is taken. Every taker becomes the owner of what it gets."""

    def __init__(self, channel: PairChannel) -> None:
        self._channel = channel
        self._held: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._memory_size = 0
        self._object_sizes: dict[int, int] = {}

    def receive(self) -> bool:
        """Read everything that has arrived; False when the controller closed its end. Raises IpcError subclasses."""
        while True:
            try:
                envelope, owned = self._channel.receive(_RING_DESCRIPTORS)
            except BlockingIOError:
                return True
            except ChannelError:
                return False
            with owned:
                if envelope is None:
                    continue
                message = envelope.message
                if isinstance(message, GuestMemory):
                    self._memory_size = message.size
                    self._hold((GuestMemory,), (owned.take(),))
                elif isinstance(message, DevicePages):
                    self._hold((DevicePages,), (owned.take(),))
                elif isinstance(message, ExitRing):
                    self._hold((ExitRing, message.vcpu), (owned.take(), owned.take(), owned.take()))
                elif isinstance(message, Interrupt):
                    self._hold((Interrupt, message.gsi), (owned.take(),))
                elif isinstance(message, ExternalInterrupt):
                    self._hold((ExternalInterrupt,), (owned.take(),))
                elif isinstance(message, MemoryObject):
                    self._object_sizes[message.slot] = message.size
                    self._hold((MemoryObject, message.slot), (owned.take(),))
                elif isinstance(message, DoorbellEvent):
                    self._hold((DoorbellEvent, message.doorbell), (owned.take(),))
                elif isinstance(message, IpiPath):
                    self._hold((IpiPath, message.vcpu, message.vector), (owned.take(),))

    def _hold(self, key: tuple[object, ...], descriptors: tuple[int, ...]) -> None:
        for descriptor in self._held.pop(key, ()):
            os.close(descriptor)
        self._held[key] = descriptors
        if len(self._held) > _MAX_HELD:
            raise ConfigurationError("more descriptors came than any configuration needs")

    def _take(self, what: str, *key: object) -> tuple[int, ...]:
        descriptors = self._held.pop(key, None)
        if descriptors is None:
            raise ConfigurationError(f"the {what} was not handed over before")
        return descriptors

    def guest_memory(self) -> tuple[int, int]:
        """Take the guest memory: descriptor and size."""
        return self._take("guest memory", GuestMemory)[0], self._memory_size

    def memory_object(self, slot: int) -> tuple[int, int]:
        """Take what is behind a memory slot: descriptor and size."""
        (descriptor,) = self._take(f"object of memory slot {slot}", MemoryObject, slot)
        return descriptor, self._object_sizes.pop(slot)

    def doorbell(self, doorbell: int) -> int:
        """Take the eventfd of a doorbell."""
        return self._take(f"eventfd of doorbell {doorbell}", DoorbellEvent, doorbell)[0]

    def device_page(self) -> int:
        """Take the device page's descriptor."""
        return self._take("device page", DevicePages)[0]

    def exit_ring(self, vcpu: int) -> tuple[int, int, int]:
        """Take ring, doorbell and completion of a vCPU."""
        ring, doorbell, completion = self._take(f"exit ring of vCPU {vcpu}", ExitRing, vcpu)
        return ring, doorbell, completion

    def interrupt(self, gsi: int) -> int:
        """Take the eventfd of a GSI."""
        return self._take(f"eventfd of GSI {gsi}", Interrupt, gsi)[0]

    def external_interrupt(self) -> int:
        """Take the eventfd of the 8259s' INTR; -1 if none came, as for a worker that does not run vCPU 0."""
        return self._held.pop((ExternalInterrupt,), (-1,))[0]

    def ipi_path(self, vcpu: int, vector: int) -> int:
        """Take the eventfd of an IPI path."""
        return self._take(f"eventfd of vector {vector:#x} to vCPU {vcpu}", IpiPath, vcpu, vector)[0]

    def send_vcpu(self, vcpu: int, descriptor: int) -> None:
        """Hand a vCPU's descriptor to the controller, which maps its kvm_run page read-only. Once, before it runs."""
        self._channel.send(VcpuDescriptor(vcpu), fds=(descriptor,))

    def close(self) -> None:
        """Close what nobody took."""
        for descriptors in self._held.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._held.clear()
