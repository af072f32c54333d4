"""Takes the ELF kernel out of a bzImage, with the decompressors of the distribution.

Deliberately not the product's own unpacker (vmm.boot): the tests compare the two.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib
from pathlib import Path

from devtool.project import DevError, cache_directory, say
from lab.debian import Kernel, cache_lock, place

# Setup header fields (Linux, Documentation/arch/x86/boot.rst), offsets in the file.
_SETUP_SECTS = 0x1F1
_HEADER_MAGIC = 0x202
_PAYLOAD_OFFSET = 0x248
_SECTOR = 512
#: The kernel's build appends the payload's unpacked size, except to gzip, whose format ends with it.
_SIZE_TRAILER = 4

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP = b"\x1f\x8b"


def ensure_vmlinux(kernel: Kernel) -> Path:
    """Return the ELF kernel of an unpacked package, from the cache or unpacked now."""
    vmlinux = cache_directory() / "vmlinux" / kernel.package
    if not vmlinux.is_file():
        with cache_lock():
            if not vmlinux.is_file():
                say(f"unpacking the kernel of {kernel.package} …")
                place(vmlinux, unpack(kernel.vmlinuz))
    return vmlinux


def unpack(vmlinuz: Path) -> bytes:
    """Return the ELF kernel in a bzImage. Raises DevError if it is none, or packed in an unknown way."""
    image = vmlinuz.read_bytes()
    if image[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise DevError(f"{vmlinuz} is no bzImage")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
    start = (image[_SETUP_SECTS] + 1) * _SECTOR + offset
    payload = image[start : start + length]
    if payload.startswith(_GZIP):
        elf = zlib.decompress(payload, wbits=31)
    elif payload.startswith(_XZ):
        elf = lzma.decompress(payload[:-_SIZE_TRAILER])
    elif payload.startswith(_LZ4_LEGACY):
        elf = _piped(["lz4", "-dc"], payload[:-_SIZE_TRAILER])
    elif payload.startswith(_ZSTD):
        elf = _piped(["zstd", "-dcq"], payload[:-_SIZE_TRAILER])
    else:
        raise DevError(f"{vmlinuz}: the payload is packed in an unknown way (it begins with {payload[:6].hex()})")
    if not elf.startswith(b"\x7fELF"):
        raise DevError(f"{vmlinuz}: the payload is no ELF file")
    return elf


def _piped(command: list[str], data: bytes) -> bytes:
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode != 0:
        raise DevError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
