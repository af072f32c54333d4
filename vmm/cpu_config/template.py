"""Custom CPU templates: the body of PUT /cpu-config, and how its bit patterns are applied.

A bit pattern is written from the highest bit, ``0`` and ``1`` for bits that are set so, ``x`` for bits that stay, ``_``
for legibility. Numbers of registers are strings in hexadecimal (0x) or binary (0b).
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.json.decoder import Reader, UnplacedError
from vmm.json.schema import STRING, U32, Field, List, Object

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_DIGITS = "0123456789abcdef"


class BitPattern(NamedTuple):
    """``filter`` has the bits that are changed, ``value`` what they become."""

    filter: int
    value: int

    def apply(self, value: int) -> int:
        """Return a value after the change."""
        return value & ~self.filter | self.value

    def text(self, bits: int) -> str:
        """Return the pattern as it is written."""
        return "0b" + "".join(
            [("x" if not self.filter >> bit & 1 else str(self.value >> bit & 1)) for bit in reversed(range(bits))]
        )


class CpuidRegisterModifier(NamedTuple):
    """A change of one register of a CPUID leaf."""

    register: str
    bitmap: BitPattern


class CpuidModifier(NamedTuple):
    """Changes of one CPUID leaf."""

    leaf: int
    subleaf: int
    flags: int
    modifiers: list[CpuidRegisterModifier]


class MsrModifier(NamedTuple):
    """A change of one model specific register."""

    addr: int
    bitmap: BitPattern


class KvmCapability(NamedTuple):
    """A capability of KVM that the start requires (``required``), or does not require although it would."""

    number: int
    required: bool


class CustomCpuTemplate(NamedTuple):
    """Body of PUT /cpu-config."""

    kvm_capabilities: list[KvmCapability]
    cpuid_modifiers: list[CpuidModifier]
    msr_modifiers: list[MsrModifier]

    def to_json(self) -> JsonValue:
        """Return the template as a body of PUT /cpu-config."""
        return {
            "kvm_capabilities": [f"{'' if item.required else '!'}{item.number}" for item in self.kvm_capabilities],
            "cpuid_modifiers": [
                {
                    "leaf": hex(item.leaf),
                    "subleaf": hex(item.subleaf),
                    "flags": item.flags,
                    "modifiers": [
                        {"register": change.register, "bitmap": change.bitmap.text(32)} for change in item.modifiers
                    ],
                }
                for item in self.cpuid_modifiers
            ],
            "msr_modifiers": [{"addr": hex(item.addr), "bitmap": item.bitmap.text(64)} for item in self.msr_modifiers],
        }


class _Number:
    """A number of 32 bits as a string with the prefix 0x or 0b."""

    __slots__ = ()

    def decode(self, reader: Reader) -> int:
        """Consume a number."""
        text = STRING.decode(reader)
        base = {"0x": 16, "0b": 2}.get(text[:2])
        if base is None:
            raise UnplacedError(
                f"No supported number system prefix found in value [{text}]. Make sure to prefix the number with '0x' "
                "for hexadecimal numbers or '0b' for binary numbers."
            )
        kind = _number_fault(text[2:], base)
        if kind is not None:
            name = "".join([word.capitalize() for word in kind[0].split()])
            raise UnplacedError(
                f"Failed to parse string [{text}] as a number for CPU template - ParseIntError {{ kind: {name} }}"
            )
        return _number(text[2:], base)


class _Capability:
    """The number of a capability of KVM, with ``!`` in front if it is not required."""

    __slots__ = ()

    def decode(self, reader: Reader) -> KvmCapability:
        """Consume a capability."""
        text = STRING.decode(reader)
        digits = text.removeprefix("!")
        fault = _number_fault(digits, 10)
        if fault is not None:
            raise UnplacedError(
                f"Failed to parse string [{text}] as a kvm capability - can not convert to numeric: {fault[1]}"
            )
        return KvmCapability(_number(digits, 10), required=not text.startswith("!"))


class _Register:
    """The name of a CPUID register."""

    __slots__ = ()

    def decode(self, reader: Reader) -> str:
        """Consume a name."""
        text = STRING.decode(reader)
        if text not in _REGISTERS:
            raise UnplacedError("Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]")
        return text


class _Bitmap:
    """A bit pattern of at most ``bits`` bits."""

    __slots__ = ("bits",)

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def decode(self, reader: Reader) -> BitPattern:
        """Consume a bit pattern."""
        text = STRING.decode(reader)
        changed = value = bit = 0
        for byte in reversed(text.removeprefix("0b").encode()):
            character = chr(byte)
            if character == "_":
                continue
            if character not in "01x":
                raise UnplacedError(f"Failed to parse string [{text}] as a bitmap - unknown character: {byte}")
            if bit == self.bits:
                raise UnplacedError(f"Failed to parse string [{text}] as a bitmap - string is too long")
            if character != "x":
                changed |= 1 << bit
                value |= int(character) << bit
            bit += 1
        return BitPattern(changed, value)


def _number_fault(digits: str, base: int) -> tuple[str, str] | None:
    """Return the name and the words of what is wrong with a number of 32 bits; None if nothing is."""
    if not digits:
        return "empty", "cannot parse integer from empty string"
    if any(digit not in _DIGITS[:base] for digit in digits.lower()):
        return "invalid digit", "invalid digit found in string"
    if len(digits.lstrip("0")) > 32 or _number(digits, base) >= 1 << 32:
        return "pos overflow", "number too large to fit in target type"
    return None


def _number(digits: str, base: int) -> int:
    """Convert digits; leading zeros are left out, since Python refuses to convert thousands of decimal digits."""
    return int(digits.lstrip("0") or "0", base)


_CPUID_REGISTER = Object(
    "CpuidRegisterModifier",
    CpuidRegisterModifier,
    Field("register", _Register()),
    Field("bitmap", _Bitmap(32)),
)
_CPUID = Object(
    "CpuidLeafModifier",
    CpuidModifier,
    Field("leaf", _Number()),
    Field("subleaf", _Number()),
    Field("flags", U32),
    Field("modifiers", List(_CPUID_REGISTER)),
)
_MSR = Object("RegisterModifier", MsrModifier, Field("addr", _Number()), Field("bitmap", _Bitmap(64)))
CPU_TEMPLATE = Object(
    "CustomCpuTemplate",
    CustomCpuTemplate,
    Field("kvm_capabilities", List(_Capability()), ()),
    Field("cpuid_modifiers", List(_CPUID), ()),
    Field("msr_modifiers", List(_MSR), ()),
)
