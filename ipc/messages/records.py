"""The schema of the worker's control channel, and what several messages hold: records, bounds, fields."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_WORKERS
from ipc.schema import U8, U32, U64, Field, Flag, Int, RecordOf, Schema, Text

WORKER = Schema()
MAX_GSI = 4096
MAX_CPUID_ENTRIES = 256
#: MSRs, and capabilities, that a CPU template may name.
MAX_TEMPLATE_ITEMS = 1024


class Failed(NamedTuple):
    """The answer to a command that could not be carried out; nothing was changed unless the text says so."""

    code: str
    text: str


class MemoryRegion(NamedTuple):
    """Guest RAM: ``size`` bytes at ``guest_address``, found at ``offset`` of the guest memory memfd."""

    guest_address: int
    size: int
    offset: int


class BootRegisters(NamedTuple):
    """Registers of the boot vCPU at the kernel's entry, as the boot protocol asks for.

    ``gdt`` holds four raw descriptors (null, code, data, TSS); selectors are their offsets. The worker derives
    the segment registers from them.
    """

    rip: int
    rsp: int
    rbp: int
    rsi: int
    rbx: int
    rflags: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdt_base: int
    gdt: tuple[int, ...]
    idt_base: int
    idt_limit: int


class Window(NamedTuple):
    """``length`` consecutive ports or MMIO bytes from ``address``.

    Ports: one slot of the device page per port, from ``slot``. MMIO: one slot for the whole window.
    """

    address: int
    length: int
    slot: int


class Route(NamedTuple):
    """GSI → MSI. ``masked`` takes the irqfd of that GSI away (events are kept in the eventfd)."""

    gsi: int
    address: int
    data: int
    masked: bool


class MsrValue(NamedTuple):
    """One model specific register."""

    register: int
    value: int


class CpuidEntry(NamedTuple):
    """One entry of KVM_SET_CPUID2."""

    leaf: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class MsrChange(NamedTuple):
    """A CPU template's change of one model specific register: the bits of ``mask`` become those of ``value``."""

    register: int
    mask: int
    value: int


class CapabilityDemand(NamedTuple):
    """A CPU template's word on one KVM_CAP_*: the host must have it (``required``), or may lack it."""

    number: int
    required: bool


ROUTE_FIELD = RecordOf(Route, gsi=Int(MAX_GSI - 1), address=Int(U64), data=Int(U32), masked=Flag())
CPUID_FIELD: Field = RecordOf(
    CpuidEntry,
    leaf=Int(U32),
    subleaf=Int(U32),
    flags=Int(U32),
    eax=Int(U32),
    ebx=Int(U32),
    ecx=Int(U32),
    edx=Int(U32),
)
CODE_FIELD = Text(64)
#: The most that a text which says why may hold, in characters: cut before it is sent.
MAX_TEXT = 1024
TEXT_FIELD = Text(MAX_TEXT)
VCPU_FIELD = Int(MAX_WORKERS - 1)
WORKER_FIELD = Int(MAX_WORKERS - 1)
WORKER.register(1, Failed, code=CODE_FIELD, text=TEXT_FIELD)
VECTOR_FIELD = Int(U8)
