"""A small writer of ACPI Machine Language: just the objects that our DSDT needs.

Source: ACPI specification 6.5, chapter 20 (AML) and 6.4 (resource descriptors). Each function returns encoded bytes;
terms are joined with ``+``.
"""

from __future__ import annotations

import struct

_NAME_OP = b"\x08"
_BYTE_PREFIX = 0x0A
_WORD_PREFIX = 0x0B
_DWORD_PREFIX = 0x0C
_STRING_PREFIX = b"\x0d"
_QWORD_PREFIX = 0x0E
_SCOPE_OP = b"\x10"
_BUFFER_OP = b"\x11"
_DUAL_NAME_PREFIX = b"\x2e"
_ROOT = b"\\"
_DEVICE_OP = b"\x5b\x82"

_IO_PORT = struct.Struct("<BBHHBB")
_EXTENDED_INTERRUPT = struct.Struct("<BHBBI")
_MEMORY32_FIXED = struct.Struct("<BHBII")
assert _IO_PORT.size == 8
assert _EXTENDED_INTERRUPT.size == 9
assert _MEMORY32_FIXED.size == 12
_END_TAG = b"\x79\0"

_DECODE_16_BITS = 1
_CONSUMER_EDGE_HIGH_EXCLUSIVE = 0b0011
_READ_WRITE = 1

_MAX_PACKAGE = 1 << 28


def package(content: bytes) -> bytes:
    """Prefix ``content`` with its PkgLength, which counts itself (20.2.4)."""
    length = len(content) + 1
    if length <= 0x3F:
        return bytes((length,)) + content
    for extra in (1, 2, 3):
        length = len(content) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            lead = extra << 6 | length & 0xF
            return bytes((lead,)) + (length >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"AML package of {len(content)} bytes, at most {_MAX_PACKAGE} are possible")


def name_segment(name: str) -> bytes:
    """Encode one name of up to four characters."""
    encoded = name.encode("ascii")
    valid = 0 < len(encoded) <= 4 and all(c in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789" for c in encoded)
    if not valid or encoded[:1].isdigit():
        raise ValueError(f"{name!r} is no AML name")
    return encoded.ljust(4, b"_")


def path(*names: str, root: bool = False) -> bytes:
    """Encode a path of one or two names."""
    segments = [name_segment(name) for name in names]
    prefix = _ROOT if root else b""
    if len(segments) == 1:
        return prefix + segments[0]
    if len(segments) == 2:
        return prefix + _DUAL_NAME_PREFIX + segments[0] + segments[1]
    raise ValueError("an AML path of ours has one or two names")


def integer(value: int) -> bytes:
    """Encode an integer of up to 64 bits in its shortest form."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((_BYTE_PREFIX, 1), (_WORD_PREFIX, 2), (_DWORD_PREFIX, 4), (_QWORD_PREFIX, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no AML integer")


def string(text: str) -> bytes:
    """Encode an ASCII string."""
    encoded = text.encode("ascii")
    if b"\0" in encoded:
        raise ValueError("an AML string has no NUL")
    return _STRING_PREFIX + encoded + b"\0"


def eisa_id(identifier: str) -> bytes:
    """Encode an EISA id such as ``PNP0501``: three letters in 5 bits each, four hexadecimal digits, big-endian."""
    letters, digits = identifier[:3], identifier[3:]
    if len(identifier) != 7 or not all("A" <= letter <= "Z" for letter in letters):
        raise ValueError(f"{identifier!r} is no EISA id")
    value = 0
    for letter in letters:
        value = value << 5 | ord(letter) - 0x40
    value = value << 16 | int(digits, 16)
    return bytes((_DWORD_PREFIX,)) + value.to_bytes(4, "big")


def name(identifier: str, value: bytes) -> bytes:
    """Define the object ``identifier`` with an encoded ``value``."""
    return _NAME_OP + name_segment(identifier) + value


def scope(location: bytes, *terms: bytes) -> bytes:
    """Open the scope at an encoded path."""
    return _SCOPE_OP + package(location + b"".join(terms))


def device(identifier: str, *terms: bytes) -> bytes:
    """Define a device."""
    return _DEVICE_OP + package(name_segment(identifier) + b"".join(terms))


def resource_template(*descriptors: bytes) -> bytes:
    """Join resource descriptors into the buffer that ``_CRS`` wants."""
    content = b"".join(descriptors) + _END_TAG
    return _BUFFER_OP + package(integer(len(content)) + content)


def io_port(address: int, count: int) -> bytes:
    """Describe ``count`` fixed ports from ``address`` on (6.4.2.5)."""
    return _IO_PORT.pack(0x47, _DECODE_16_BITS, address, address, 1, count)


def interrupt(gsi: int) -> bytes:
    """Describe an edge-triggered, active-high, exclusive interrupt that the device uses (6.4.3.6)."""
    return _EXTENDED_INTERRUPT.pack(0x89, _EXTENDED_INTERRUPT.size - 3, _CONSUMER_EDGE_HIGH_EXCLUSIVE, 1, gsi)


def memory32(address: int, size: int) -> bytes:
    """Describe a fixed read-write memory window below 4 GiB (6.4.3.4)."""
    return _MEMORY32_FIXED.pack(0x86, _MEMORY32_FIXED.size - 3, _READ_WRITE, address, size)
