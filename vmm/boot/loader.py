"""From a kernel file to a guest that is ready for its first instruction: the one entry of ``vmm.boot``."""

from __future__ import annotations

import os
import stat

from base.errno_text import errno_text
from base.lean_typing import NamedTuple, Sequence
from ipc.guest_mapping import HUGE_PAGE_SIZE
from ipc.guest_memory import GuestMemory
from ipc.messages.records import BootRegisters
from vmm import layout
from vmm.boot import acpi, bzimage, elf, heap, long_mode, mptable, payload, pvh, zero_page
from vmm.boot.cmdline import Cmdline
from vmm.boot.errors import (
    INITRD_PREFIX,
    InitrdError,
    KernelError,
    UnsupportedPayloadError,
    bzimage_error,
    elf_error,
    read_error,
)
from vmm.boot.image_file import KernelFile, load_elf, new_hasher
from vmm.boot.image_memory import ImageMemory
from vmm.boot.timings import Timings
from vmm.boot.unpack import PayloadDetails, load_unpacked

#: Which entry of the kernel to use: the fitting one, or one of the two wherever the kernel has it.
ENTRY_AUTO = "auto"
ENTRY_PVH = "pvh"
ENTRY_LINUX64 = "linux64"

#: As the log names the protocols.
PROTOCOL_PVH = "PVH"
PROTOCOL_LINUX64 = "Linux 64-bit"

#: The most that is prepared of what a Linux guest takes first.
_BEHIND_KERNEL = 32 << 20
_BELOW_INITRD = 8 << 20

KIND_ELF = "vmlinux"
KIND_BZIMAGE = "bzImage"


class BootedImage(NamedTuple):
    """A guest that is ready to run. Addresses are the guest's, timings are (step, nanoseconds) in order.

    ``kernel_end`` covers what the kernel needs before it looks at its memory map. ``note`` is for the log: why a
    bzImage is entered as it is although it should have been unpacked, or what of a
    kernel lies where boot structures are written.
    """

    registers: BootRegisters
    protocol: str
    kind: str
    payload: PayloadDetails | None
    note: str
    kernel_start: int
    kernel_end: int
    initrd: tuple[int, int] | None
    command_line: str
    rsdp_address: int
    system_memory: layout.SystemMemory
    timings: tuple[tuple[str, int], ...]


class _Kernel(NamedTuple):
    """A kernel in guest memory. ``entry64`` and ``pvh_entry`` are where it can be entered."""

    kind: str
    entry64: int
    pvh_entry: int | None
    start: int
    end: int
    initrd_address_max: int
    setup_header: bytes | None
    payload: PayloadDetails | None
    note: str
    #: None: a bzImage that is entered as it is.
    image: elf.ElfImage | None = None


def warm(*, kernel_cache: bool = True) -> None:
    """Import all that loading a kernel may need; late imports fail inside the jail.

    ``kernel_cache`` says whether there will be one: it needs hashlib, whose OpenSSL is 3 ms and 2 MiB of every cell.
    """
    payload.warm()
    heap.warm()
    if kernel_cache:
        hasher = new_hasher()
        assert hasher is not None
        hasher.update(b"")


def load_kernel(
    memory: GuestMemory,
    kernel_fd: int,
    cmdline: Cmdline,
    initrd_fd: int | None = None,
    *,
    vcpu_count: int = 1,
    devices: Sequence[acpi.VirtioMmioDevice] = (),
    cache_fd: int = -1,
    unpack: bool = True,
    entry: str = ENTRY_AUTO,
    huge_pages: bool = False,
) -> BootedImage:
    """Load kernel, initrd, command line and all boot structures into fresh (zero) guest memory.

    ``cache_fd`` is the directory of unpacked kernels, or -1. With ``unpack`` a compressed bzImage is unpacked here
    and its vmlinux entered, else it unpacks itself. ``huge_pages``: the host has some to give. Raises LayoutError or
    a BootError (KernelError, CmdlineError, …) and leaves guest memory empty then, so that another attempt starts
    afresh.
    """
    content = ImageMemory(memory, huge_pages=huge_pages)
    with _CleanedOnFailure(content):
        timings = Timings()
        memory_map = layout.memory_map(memory.regions)
        command_line = cmdline.to_bytes()
        kernel = _load_kernel_file(content, kernel_fd, cache_fd, unpack, timings)
        use_pvh = _choose_pvh(kernel, entry)
        initrd = None
        if initrd_fd is not None:
            initrd = _load_initrd(content, initrd_fd, kernel)
            timings.done("initrd")
        if kernel.end - kernel.start >= HUGE_PAGE_SIZE and _prepare_first_used(content, kernel.end, initrd):
            timings.done("huge pages")
        memory.write(layout.COMMAND_LINE_ADDRESS, command_line)
        system_memory = layout.SystemMemory()
        mptable.write(memory, system_memory, vcpu_count)
        rsdp_address = acpi.write_tables(memory, system_memory, vcpu_count, devices)
        if use_pvh:
            assert kernel.pvh_entry is not None
            pvh.write(memory, memory_map, initrd, rsdp_address)
            registers = long_mode.enter_pvh(memory, kernel.pvh_entry)
        else:
            page = zero_page.build(memory_map, len(command_line) - 1, initrd, rsdp_address, kernel.setup_header)
            zero_page.write(memory, page)
            registers = long_mode.enter_64bit(memory, kernel.entry64)
        timings.done("tables")
    return BootedImage(
        registers=registers,
        protocol=PROTOCOL_PVH if use_pvh else PROTOCOL_LINUX64,
        kind=kernel.kind,
        payload=kernel.payload,
        note=kernel.note or _written_over(kernel, use_pvh),
        kernel_start=kernel.start,
        kernel_end=kernel.end,
        initrd=initrd,
        command_line=command_line[:-1].decode(),
        rsdp_address=rsdp_address,
        system_memory=system_memory,
        timings=tuple(timings.steps),
    )


class _CleanedOnFailure:
    """Empties guest memory when loading fails, and turns what the system says into errors of ours."""

    __slots__ = ("_memory",)

    def __init__(self, memory: ImageMemory) -> None:
        self._memory = memory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        self._memory.clear()
        if isinstance(error, OSError):
            raise read_error(errno_text(error)) from error
        if isinstance(error, MemoryError):
            raise KernelError("kernel.host_memory", "Cannot load kernel: the host has not enough memory") from error


def _choose_pvh(kernel: _Kernel, entry: str) -> bool:
    """Choose the protocol. Raises KernelError when the kernel lacks the entry that was asked for."""
    if entry == ENTRY_PVH and kernel.pvh_entry is None:
        raise elf_error("kernel.elf.notes", "PVH entry point not present", "use another kernel entry")
    if kernel.kind == KIND_ELF:
        use_pvh = kernel.pvh_entry is not None and entry != ENTRY_LINUX64
    else:
        # With a bzImage comes a setup header, which only the 64-bit protocol hands on.
        use_pvh = entry == ENTRY_PVH
    if not use_pvh and kernel.image is not None:
        elf.check_entry(kernel.image, kernel.entry64)
    if not use_pvh and kernel.kind == KIND_ELF and kernel.end > layout.IDENTITY_MAP_SIZE:
        raise elf_error("kernel.elf.segment", "Invalid Program Header Address", "the kernel ends beyond 1 GiB")
    return use_pvh


def _written_over(kernel: _Kernel, use_pvh: bool) -> str:
    """Say what of the kernel lies where boot structures are written after it; empty when nothing does."""
    for piece in kernel.image.pieces if kernel.image is not None else ():
        for written_start, written_end in layout.PVH_WRITTEN if use_pvh else layout.LINUX64_WRITTEN:
            start = max(written_start, piece.address)
            end = min(written_end, piece.address + piece.file_size)
            if start < end:
                return f"What the kernel has for {start:#x} to {end:#x} lies where boot structures are written."
    return ""


def _load_kernel_file(memory: ImageMemory, fd: int, cache_fd: int, unpack: bool, timings: Timings) -> _Kernel:
    file = KernelFile.look(fd, bzimage.HEADER_READ_SIZE)
    if elf.is_elf(file.start):
        image, pvh_entry = load_elf(memory, fd, file.size)
        timings.done("load")
        return _elf_kernel(KIND_ELF, image, pvh_entry)
    image_header = bzimage.parse(file.start, file.size)
    note = ""
    if unpack:
        try:
            unpacked = load_unpacked(memory, file, image_header, cache_fd, timings)
            return _elf_kernel(KIND_BZIMAGE, unpacked.image, unpacked.pvh_entry)._replace(
                initrd_address_max=image_header.initrd_address_max,
                setup_header=image_header.setup_header,
                payload=unpacked.details,
            )
        except UnsupportedPayloadError as error:
            note = str(error)
    bzimage.check_placement(image_header, memory.guest)
    length = image_header.protected_mode_size
    if memory.read_from_file(fd, image_header.protected_mode_offset, layout.BZIMAGE_ADDRESS, length) != length:
        raise bzimage_error("kernel.bzimage.truncated", "Unable to read bzImage compressed kernel")
    timings.done("load")
    return _Kernel(
        kind=KIND_BZIMAGE,
        entry64=layout.BZIMAGE_ADDRESS + bzimage.ENTRY_OFFSET,
        pvh_entry=None,
        start=layout.BZIMAGE_ADDRESS,
        end=bzimage.end_of_work_area(image_header),
        initrd_address_max=image_header.initrd_address_max,
        setup_header=image_header.setup_header,
        payload=None,
        note=note,
    )


def _elf_kernel(kind: str, image: elf.ElfImage, pvh_entry: int | None) -> _Kernel:
    return _Kernel(kind, image.entry, pvh_entry, image.start, image.end, (1 << 32) - 1, None, None, "", image)


def _prepare_first_used(memory: ImageMemory, kernel_end: int, initrd: tuple[int, int] | None) -> bool:
    """Back by huge pages what a Linux guest takes first; tell whether any were taken.

    Its page allocator hands out the lowest addresses behind the kernel first, its early allocator (memory map, hash
    tables) the highest below the initrd. Little enough that no guest leaves it unused: 5/32 of RAM, 40 MiB at most.
    (What is smaller than a huge page is no Linux, and is not asked for: it may need a hundredth of that.)
    """
    ram = memory.guest.regions[0].size
    behind = min(_BEHIND_KERNEL, ram // 8)
    below = min(_BELOW_INITRD, ram // 32)
    top = initrd[0] if initrd is not None else ram
    if kernel_end + behind > top - below:
        return False
    prepared = memory.prepare_huge(kernel_end, behind)
    return memory.prepare_huge(top - below, below) or prepared


# ---------------------------------------------------------------- initrd


def _load_initrd(memory: ImageMemory, fd: int, kernel: _Kernel) -> tuple[int, int]:
    """Load the initrd at the top of the first RAM region, page aligned; return (address, size)."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise InitrdError(
                "initrd.file",
                f"{INITRD_PREFIX}Cannot load initrd due to an invalid image: it is empty or not a regular file",
            )
        size = status.st_size
        top = min(memory.guest.regions[0].size, kernel.initrd_address_max + 1)
        address = (top - size) // layout.PAGE_SIZE * layout.PAGE_SIZE
        if address < kernel.end:
            raise InitrdError(
                "initrd.memory",
                f"{INITRD_PREFIX}Failed to compute the initrd address. ({size} bytes do not fit between the kernel's "
                f"end at {kernel.end:#x} and {top:#x}: give the guest more memory)",
            )
        memory.prepare_huge(address, size)
        if memory.read_from_file(fd, 0, address, size) != size:
            raise InitrdError(
                "initrd.truncated",
                f"{INITRD_PREFIX}Cannot load initrd due to an invalid image: the file became shorter",
            )
    except OSError as error:
        raise InitrdError(
            "initrd.read", f"{INITRD_PREFIX}Cannot load initrd due to an invalid image: {errno_text(error)}"
        ) from error
    return address, size
