"""Numbers and byte layouts of the KVM API (x86-64), declared once.

Offsets are bytes within the structure that their prefix names. ``struct.Struct`` objects hold one structure each,
in the order of the header's fields.
"""

from __future__ import annotations

from struct import Struct

# ---------------------------------------------------------------- ioctl request codes (asm-generic/ioctl.h)

_KVMIO = 0xAE


def _io(number: int) -> int:
    return _KVMIO << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _KVMIO << 8 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _KVMIO << 8 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | _KVMIO << 8 | number


# Sizes that are part of a request code. A flexible array member does not count.
REGS_SIZE = 144
SEGMENT_SIZE = 24
SREGS_SIZE = 312
SREGS2_SIZE = 320
FPU_SIZE = 416
LAPIC_SIZE = 1024
VCPU_EVENTS_SIZE = 64
DEBUGREGS_SIZE = 128
XSAVE_SIZE = 4096
XCRS_SIZE = 392
CLOCK_SIZE = 48
MP_STATE_SIZE = 4
IOEVENTFD_SIZE = 64
ENABLE_CAP_SIZE = 104
GUEST_DEBUG_SIZE = 72

# /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, 4)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, 8)
# VM
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, 32)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
KVM_SET_GSI_ROUTING = _iow(0x6A, 8)
KVM_IRQFD = _iow(0x76, 32)
KVM_IOEVENTFD = _iow(0x79, IOEVENTFD_SIZE)
KVM_SET_CLOCK = _iow(0x7B, CLOCK_SIZE)
KVM_GET_CLOCK = _ior(0x7C, CLOCK_SIZE)
KVM_ENABLE_CAP = _iow(0xA3, ENABLE_CAP_SIZE)
KVM_SIGNAL_MSI = _iow(0xA5, 32)
# vCPU
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, REGS_SIZE)
KVM_SET_REGS = _iow(0x82, REGS_SIZE)
KVM_GET_SREGS = _ior(0x83, SREGS_SIZE)
KVM_SET_SREGS = _iow(0x84, SREGS_SIZE)
KVM_GET_MSRS = _iowr(0x88, 8)
KVM_SET_MSRS = _iow(0x89, 8)
KVM_GET_FPU = _ior(0x8C, FPU_SIZE)
KVM_SET_FPU = _iow(0x8D, FPU_SIZE)
KVM_GET_LAPIC = _ior(0x8E, LAPIC_SIZE)
KVM_SET_LAPIC = _iow(0x8F, LAPIC_SIZE)
KVM_SET_CPUID2 = _iow(0x90, 8)
KVM_GET_CPUID2 = _iowr(0x91, 8)
KVM_GET_MP_STATE = _ior(0x98, MP_STATE_SIZE)
KVM_SET_MP_STATE = _iow(0x99, MP_STATE_SIZE)
KVM_SET_GUEST_DEBUG = _iow(0x9B, GUEST_DEBUG_SIZE)
KVM_GET_VCPU_EVENTS = _ior(0x9F, VCPU_EVENTS_SIZE)
KVM_SET_VCPU_EVENTS = _iow(0xA0, VCPU_EVENTS_SIZE)
KVM_GET_DEBUGREGS = _ior(0xA1, DEBUGREGS_SIZE)
KVM_SET_DEBUGREGS = _iow(0xA2, DEBUGREGS_SIZE)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_XSAVE = _ior(0xA4, XSAVE_SIZE)
KVM_SET_XSAVE = _iow(0xA5, XSAVE_SIZE)
KVM_GET_XSAVE2 = _ior(0xCF, XSAVE_SIZE)
KVM_GET_XCRS = _ior(0xA6, XCRS_SIZE)
KVM_SET_XCRS = _iow(0xA7, XCRS_SIZE)
KVM_KVMCLOCK_CTRL = _io(0xAD)
KVM_GET_SREGS2 = _ior(0xCC, SREGS2_SIZE)
KVM_SET_SREGS2 = _iow(0xCD, SREGS2_SIZE)
KVM_SET_DEVICE_ATTR = _iow(0xE1, 24)
KVM_GET_DEVICE_ATTR = _iow(0xE2, 24)
KVM_HAS_DEVICE_ATTR = _iow(0xE3, 24)

#: The only API version there is since Linux 2.6.22; others must be refused.
API_VERSION = 12

# ---------------------------------------------------------------- capabilities

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MP_STATE = 14
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_IRQFD = 32
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_SYNC_REGS = 74
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_VCPU_ATTRIBUTES = 127
KVM_CAP_X2APIC_API = 129
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_SREGS2 = 200
KVM_CAP_XSAVE2 = 208

X2APIC_API_USE_32BIT_IDS = 1
X2APIC_API_DISABLE_BROADCAST_QUIRK = 2

# ---------------------------------------------------------------- struct kvm_run (the mapped page of a vCPU)

RUN_SIZE = 2352  # the structure; the mapping is KVM_GET_VCPU_MMAP_SIZE bytes
RUN_REQUEST_INTERRUPT_WINDOW = 0
RUN_IMMEDIATE_EXIT = 1
RUN_EXIT_REASON = 8
RUN_READY_FOR_INTERRUPT_INJECTION = 12
RUN_IF_FLAG = 13
RUN_EXIT = 32  # the union
RUN_IO_DIRECTION = 32  # u8
RUN_IO_SIZE = 33  # u8
RUN_IO_PORT = 34  # u16
RUN_IO_COUNT = 36  # u32
RUN_IO_DATA_OFFSET = 40  # u64, from the start of the mapping
RUN_MMIO_PHYS_ADDR = 32  # u64
RUN_MMIO_DATA = 40  # u8[8]
RUN_MMIO_LEN = 48  # u32
RUN_MMIO_IS_WRITE = 52  # u8
RUN_FAIL_ENTRY_REASON = 32  # u64
RUN_FAIL_ENTRY_CPU = 40  # u32
RUN_INTERNAL_SUBERROR = 32  # u32
RUN_INTERNAL_NDATA = 36  # u32
RUN_INTERNAL_DATA = 40  # u64[16]
RUN_SYSTEM_EVENT_TYPE = 32  # u32
RUN_SYSTEM_EVENT_NDATA = 36  # u32
RUN_SYSTEM_EVENT_DATA = 40  # u64[16]
RUN_VALID_REGS = 288  # u64
RUN_DIRTY_REGS = 296  # u64
RUN_SYNC_REGS = 304  # struct kvm_regs
RUN_SYNC_SREGS = RUN_SYNC_REGS + REGS_SIZE
RUN_SYNC_EVENTS = RUN_SYNC_SREGS + SREGS_SIZE
assert RUN_SYNC_EVENTS + VCPU_EVENTS_SIZE == RUN_SYNC_REGS + 520  # struct kvm_sync_regs
assert RUN_SYNC_REGS + 2048 == RUN_SIZE

SYNC_X86_REGS = 1
SYNC_X86_SREGS = 2
SYNC_X86_EVENTS = 4

EXIT_UNKNOWN = 0
EXIT_EXCEPTION = 1
EXIT_IO = 2
EXIT_HYPERCALL = 3
EXIT_DEBUG = 4
EXIT_HLT = 5
EXIT_MMIO = 6
EXIT_IRQ_WINDOW_OPEN = 7
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24
EXIT_IOAPIC_EOI = 26

EXIT_IO_IN = 0
EXIT_IO_OUT = 1

SYSTEM_EVENT_SHUTDOWN = 1
SYSTEM_EVENT_RESET = 2
SYSTEM_EVENT_CRASH = 3

INTERNAL_ERROR_EMULATION = 1

# ---------------------------------------------------------------- structures

#: rax rbx rcx rdx rsi rdi rsp rbp r8…r15 rip rflags
REGS = Struct("<18Q")
REGS_NAMES = tuple("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split())
REGS_RIP = 128
#: base limit selector type present dpl db s l g avl unusable padding
SEGMENT = Struct("<QIH10B")
#: base limit padding
DTABLE = Struct("<QH6x")
# struct kvm_sregs (and kvm_sregs2 up to apic_base)
SREGS_CS = 0
SREGS_DS = 24
SREGS_ES = 48
SREGS_FS = 72
SREGS_GS = 96
SREGS_SS = 120
SREGS_TR = 144
SREGS_LDT = 168
SREGS_GDT = 192
SREGS_IDT = 208
SREGS_CR0 = 224
SREGS_CR2 = 232
SREGS_CR3 = 240
SREGS_CR4 = 248
SREGS_CR8 = 256
SREGS_EFER = 264
SREGS_APIC_BASE = 272
# struct kvm_vcpu_events
EVENTS_INTERRUPT_INJECTED = 8  # u8
EVENTS_INTERRUPT_NR = 9  # u8
EVENTS_INTERRUPT_SOFT = 10  # u8
FPU_FCW = 128  # u16
FPU_MXCSR = 408  # u32
#: slot flags guest_phys_addr memory_size userspace_addr
USERSPACE_MEMORY_REGION = Struct("<IIQQQ")
MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2
#: cap flags args[4] pad[64]
ENABLE_CAP = Struct("<IIQQQQ64x")
#: nent padding
CPUID2_HEADER = Struct("<II")
#: function index flags eax ebx ecx edx padding[3]
CPUID_ENTRY2 = Struct("<7I12x")
CPUID_FLAG_SIGNIFICANT_INDEX = 1
MAX_CPUID_ENTRIES = 256
#: nmsrs pad
MSRS_HEADER = Struct("<II")
#: index reserved data
MSR_ENTRY = Struct("<IIQ")
#: KVM_{GET,SET}_MSRS refuse more at once (MAX_IO_MSRS)
MAX_IO_MSRS = 256
#: nmsrs
MSR_LIST_HEADER = Struct("<I")
#: nr flags
IRQ_ROUTING_HEADER = Struct("<II")
#: gsi type flags pad | msi: address_lo address_hi data devid | pad to 48
IRQ_ROUTING_ENTRY_MSI = Struct("<IIII4I16x")
IRQ_ROUTING_MSI = 2
#: address_lo address_hi data flags devid pad[12]
MSI = Struct("<5I12x")
#: fd gsi flags resamplefd pad[16]
IRQFD = Struct("<4I16x")
IRQFD_FLAG_DEASSIGN = 1
#: datamatch addr len fd flags pad[36]
IOEVENTFD = Struct("<QQIiI36x")
IOEVENTFD_FLAG_DATAMATCH = 1
IOEVENTFD_FLAG_PIO = 2
IOEVENTFD_FLAG_DEASSIGN = 4
#: flags group attr addr
DEVICE_ATTR = Struct("<IIQQ")
VCPU_TSC_CTRL = 0
VCPU_TSC_OFFSET = 0

#: control pad debugreg[8]
GUEST_DEBUG = Struct("<II8Q")
GUESTDBG_ENABLE = 1
GUESTDBG_SINGLESTEP = 2
GUESTDBG_USE_HW_BP = 0x20000
#: clock flags pad realtime host_tsc pad[4]
CLOCK_DATA = Struct("<QIIQQ16x")
CLOCK_REALTIME = 4

MP_STATE = Struct("<I")
MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1
MP_STATE_INIT_RECEIVED = 2
MP_STATE_HALTED = 3

assert REGS.size == REGS_SIZE and len(REGS_NAMES) == 18
assert SEGMENT.size == SEGMENT_SIZE and DTABLE.size == 16
assert SREGS_APIC_BASE + 8 + 256 // 8 == SREGS_SIZE
assert SREGS_APIC_BASE + 8 + 8 + 4 * 8 == SREGS2_SIZE
assert USERSPACE_MEMORY_REGION.size == 32 and ENABLE_CAP.size == ENABLE_CAP_SIZE
assert CPUID2_HEADER.size == 8 and CPUID_ENTRY2.size == 40
assert MSRS_HEADER.size == 8 and MSR_ENTRY.size == 16
assert IRQ_ROUTING_HEADER.size == 8 and IRQ_ROUTING_ENTRY_MSI.size == 48
assert MSI.size == 32 and IRQFD.size == 32 and IOEVENTFD.size == IOEVENTFD_SIZE
assert GUEST_DEBUG.size == GUEST_DEBUG_SIZE and CLOCK_DATA.size == CLOCK_SIZE
assert DEVICE_ATTR.size == 24 and MP_STATE.size == MP_STATE_SIZE

# Registers of the local APIC page (KVM_GET_LAPIC), offsets in bytes.
APIC_TPR = 0x80
APIC_EOI = 0xB0
APIC_SPIV = 0xF0
#: In-service and interrupt request registers: eight words of 32 bits each, 16 bytes apart.
APIC_ISR = 0x100
APIC_IRR = 0x200
#: Vectors below are never delivered: their priority class is 0.
FIRST_VECTOR = 16


def apic_vectors(lapic: bytes | bytearray, register: int) -> list[int]:
    """Return the vectors, in rising order, that are set in the IRR or ISR of a LAPIC page and can be delivered."""
    return [
        vector
        for word in range(8)
        if (bits := int.from_bytes(lapic[register + 16 * word : register + 16 * word + 4], "little"))
        for vector in range(max(32 * word, FIRST_VECTOR), 32 * word + 32)
        if bits >> (vector & 31) & 1
    ]


#: An MSI of fixed delivery to one APIC id below 256 goes to this address, with the id in the bits from 12 on.
MSI_ADDRESS_BASE = 0xFEE0_0000
MSI_DESTINATION_SHIFT = 12
APIC_LVTT = 0x320
APIC_LVT_THERMAL = 0x330
APIC_LVT_PERFORMANCE = 0x340
APIC_LVT_LINT0 = 0x350
APIC_LVT_LINT1 = 0x360
APIC_LVT_ERROR = 0x370
APIC_TMICT = 0x380
APIC_TMCCT = 0x390
APIC_TDCR = 0x3E0
APIC_MODE_NMI = 4
APIC_MODE_EXTINT = 7


def x2apic_msr(register: int) -> int:
    """Return the MSR by which an x2APIC's register is accessed."""
    return 0x800 + (register >> 4)


def request_name(request: int) -> str:
    """Return the name of a request code, for error texts and for the list of what the seccomp policy allows."""
    for name, value in globals().items():
        if value == request and name.startswith("KVM_") and not name.startswith("KVM_CAP_"):
            return name
    return f"ioctl {request:#x}"
