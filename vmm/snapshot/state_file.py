"""The frames of a saved state (docs/formats/microvm-state.md): named sections, each with its length and checksum.

It knows no section and no unit: vmm.snapshot.section does.
"""

from __future__ import annotations

import binascii
import struct

from base.lean_typing import NamedTuple, Sequence
from ipc.schema import MAX_FRAME_SIZE, U16
from vmm.errors import VmmError

VERSION = 4
MAGIC = b"CBSTATE\n"
#: Magic, version, number of sections.
_FILE_HEADER = struct.Struct("<8sII")
assert _FILE_HEADER.size == 16
#: Bytes of name and instance, version, flags, bytes of the content, checksum of all this (as 0) and what follows.
_SECTION_HEADER = struct.Struct("<BBHIII")
assert _SECTION_HEADER.size == 16
FLAG_REQUIRED = 1

MAX_SECTIONS = 4096
MAX_NAME = 32
MAX_INSTANCE = 64


class MicrovmStateError(VmmError):
    """The bytes are no state that this version knows."""

    code = "vmm.state_record"


class Frame(NamedTuple):
    """One section as bytes. ``required``: a reader that does not know it must refuse the whole."""

    name: str
    instance: str
    version: int
    required: bool
    content: bytes


def write(frames: Sequence[Frame]) -> bytes:
    """Return the frames as bytes. Raises MicrovmStateError if one is out of bounds, or comes twice."""
    if len(frames) > MAX_SECTIONS:
        raise MicrovmStateError(f"There are more than {MAX_SECTIONS} sections.")
    if len({frame[:2] for frame in frames}) != len(frames):
        raise MicrovmStateError("A section comes twice.")
    return b"".join([_FILE_HEADER.pack(MAGIC, VERSION, len(frames)), *[_section(frame) for frame in frames]])


def _section(frame: Frame) -> bytes:
    try:
        name, instance = frame.name.encode("ascii"), frame.instance.encode("ascii")
    except UnicodeEncodeError:
        raise MicrovmStateError("The name of a section is not ASCII.") from None
    content = frame.content
    named = 0 < len(name) <= MAX_NAME and len(instance) <= MAX_INSTANCE
    if not named or not 0 < frame.version <= U16 or len(content) > MAX_FRAME_SIZE:
        raise MicrovmStateError(f"The section {frame.name} {frame.instance} is out of its bounds.")
    fields = (len(name), len(instance), frame.version, FLAG_REQUIRED if frame.required else 0, len(content))
    named_content = name + instance + content
    checksum = binascii.crc32(named_content, binascii.crc32(_SECTION_HEADER.pack(*fields, 0)))
    return _SECTION_HEADER.pack(*fields, checksum) + named_content


def read(data: bytes) -> list[Frame]:
    """Return the frames of what was written, unless it was damaged. Raises MicrovmStateError only."""
    if len(data) < _FILE_HEADER.size:
        raise MicrovmStateError("This is no state of a microVM: it ends too early.")
    magic, version, count = _FILE_HEADER.unpack_from(data)
    if magic != MAGIC:
        raise MicrovmStateError("This is no state of a microVM.")
    if version != VERSION:
        raise MicrovmStateError(f"This is a state of version {version}, not {VERSION}.")
    if count > MAX_SECTIONS:
        raise MicrovmStateError(f"There are more than {MAX_SECTIONS} sections.")
    frames = []
    position = _FILE_HEADER.size
    for _ in range(count):
        frame, position = _frame(data, position)
        frames.append(frame)
    if position != len(data):
        raise MicrovmStateError(f"{len(data) - position} bytes follow the last section.")
    if len({frame[:2] for frame in frames}) != count:
        raise MicrovmStateError("A section comes twice.")
    return frames


def _frame(data: bytes, position: int) -> tuple[Frame, int]:
    """Return the section at ``position``, and where the next one is."""
    start = position + _SECTION_HEADER.size
    if start > len(data):
        raise MicrovmStateError("It ends within a section.")
    *fields, checksum = _SECTION_HEADER.unpack_from(data, position)
    name_length, instance_length, version, flags, length = fields
    if not 0 < name_length <= MAX_NAME or instance_length > MAX_INSTANCE or length > MAX_FRAME_SIZE:
        raise MicrovmStateError("A section is out of its bounds.")
    end = start + name_length + instance_length + length
    if end > len(data):
        raise MicrovmStateError("It ends within a section.")
    if not version or flags & ~FLAG_REQUIRED:
        raise MicrovmStateError("A section has a version or flags that do not exist.")
    if binascii.crc32(data[start:end], binascii.crc32(_SECTION_HEADER.pack(*fields, 0))) != checksum:
        raise MicrovmStateError("A section is damaged: its checksum is wrong.")
    try:
        name = data[start : start + name_length].decode("ascii")
        instance = data[start + name_length : start + name_length + instance_length].decode("ascii")
    except UnicodeDecodeError:
        raise MicrovmStateError("The name of a section is not ASCII.") from None
    return Frame(name, instance, version, bool(flags & FLAG_REQUIRED), data[end - length : end]), end
