"""The descriptor channel of a worker: what it gets before Configure, and the kvm_run pages that come back, once."""

from __future__ import annotations

import fcntl
import os
import stat

from base.lean_typing import Any, NamedTuple, Sequence
from ipc.channel import PairChannel
from ipc.errors import IpcError
from ipc.guest_mapping import map_read_only
from ipc.messages.descriptors import DevicePages, ExitRing, ExternalInterrupt, VcpuDescriptor
from vmm.errors import WorkerError


class WorkerDescriptors:
    """What a worker gets before Configure, beside what its VM has; the descriptors stay with the caller."""

    __slots__ = ("device_page", "external_interrupt", "rings")

    def __init__(
        self, device_page: int, rings: Sequence[tuple[int, int, int, int]], *, external_interrupt: int = -1
    ) -> None:
        self.device_page = device_page
        #: (vCPU, ring memfd, doorbell, completion)
        self.rings = rings
        #: The eventfd of INTR, for the worker of vCPU 0; -1 for others.
        self.external_interrupt = external_interrupt


class VmChange(NamedTuple):
    """A change of a worker's VM (``ipc.messages.vm``), and the descriptors that are sent ahead of it."""

    message: Any
    #: (message of the descriptor channel, descriptor); the descriptors stay with the caller.
    descriptors: tuple[tuple[Any, int], ...] = ()


def send_descriptors(channel: PairChannel, descriptors: WorkerDescriptors) -> None:
    """Send everything; does not block if the socket does not. Raises IpcError."""
    channel.send(DevicePages(), fds=(descriptors.device_page,))
    for vcpu, *ring in descriptors.rings:
        channel.send(ExitRing(vcpu), fds=tuple(ring))
    if descriptors.external_interrupt >= 0:
        channel.send(ExternalInterrupt(), fds=(descriptors.external_interrupt,))


def receive_run_pages(channel: PairChannel, vcpus: Sequence[int], size: int) -> dict[int, memoryview]:
    """Map kvm_run of each vCPU read-only; the messages have come by now. Raises WorkerError."""
    pages: dict[int, memoryview] = {}
    try:
        for vcpu in vcpus:
            pages[vcpu] = _receive_run_page(channel, vcpu, size)
    except BaseException:
        for page in pages.values():
            page.release()
        raise
    return pages


def _receive_run_page(channel: PairChannel, vcpu: int, size: int) -> memoryview:
    try:
        envelope, owned = channel.receive(1)
    except (BlockingIOError, IpcError) as error:
        raise WorkerError(f"it did not hand over vCPU {vcpu}: {error}") from None
    with owned:
        if envelope is None or envelope.message != VcpuDescriptor(vcpu) or len(owned) != 1:
            raise WorkerError(f"it did not hand over vCPU {vcpu}")
        descriptor = owned.take()
        try:
            if _can_shrink(descriptor):
                raise WorkerError(f"what it handed over as vCPU {vcpu} is a file")
            return map_read_only(descriptor, size)
        except OSError as error:
            raise WorkerError(f"its vCPU {vcpu} cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)


def _can_shrink(descriptor: int) -> bool:
    """Tell whether reading a mapping of it could end us (SIGBUS) because its other holder cuts it off."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        return not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        return True
