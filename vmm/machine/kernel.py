"""Loads the guest's kernel and initrd into its memory, and logs how."""

from __future__ import annotations

from base.lean_typing import Iterator, Sequence
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import LaunchPlan
from ipc.messages.records import BootRegisters
from vmm.boot.acpi import VirtioMmioDevice
from vmm.boot.cmdline import Cmdline, complete, root_parameters, virtio_mmio_parameter
from vmm.boot.loader import KIND_BZIMAGE, load_kernel
from vmm.config.resources import VmResources
from vmm.observe.logger import DEBUG, LOG


def load_boot_source(
    resources: VmResources, memory: GuestMemory, plan: LaunchPlan, devices: Sequence[VirtioMmioDevice] = ()
) -> BootRegisters:
    """Load kernel and initrd into guest memory and log how. Raises LayoutError or a BootError.

    The virtio-mmio devices stand in the ACPI tables and, for kernels without ACPI, on the command line.
    """
    options = resources.options
    source = resources.require_boot_source()
    cache = options.kernel_cache_fd if options.kernel_cache_fd >= 0 else plan.kernel_cache_fd
    cmdline = Cmdline(source.command_line)
    announced = [virtio_mmio_parameter(*device) for device in devices]
    complete(cmdline, pci=False, parameters=[*_root(resources), *announced])
    image = load_kernel(
        memory,
        source.kernel_fd,
        cmdline,
        source.initrd_fd if source.initrd_fd >= 0 else None,
        vcpu_count=resources.machine_config.vcpu_count,
        devices=devices,
        cache_fd=cache,
        unpack=options.unpack_kernel,
        entry=options.kernel_entry,
        huge_pages=plan.huge_pages,
    )
    mark = " (bzImage)" if image.kind == KIND_BZIMAGE else ""
    LOG.info(f"Kernel loaded using {image.protocol} boot protocol{mark}")
    if image.note:
        LOG.warn(image.note)
    if LOG.level >= DEBUG:
        steps = ", ".join(f"{step} {nanoseconds // 1000} us" for step, nanoseconds in image.timings)
        LOG.debug(f"Kernel loading took: {steps}")
    return image.registers


def _root(resources: VmResources) -> Iterator[str]:
    """Name the root device; the transport gives it the first window, and Linux the first name."""
    if resources.drives.has_root:
        root = resources.drives.configs[0]
        device = "/dev/vda" if root.partuuid is None else f"PARTUUID={root.partuuid}"
        yield root_parameters(device, bool(root.is_read_only))
