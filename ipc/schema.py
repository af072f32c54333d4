"""A small typed schema for messages: every message is a NamedTuple whose fields have bounds.

Messages travel as msgpack arrays of plain values. Decoding is strict: wrong type, wrong length, a value out of its
bounds, an unknown kind — each is a MessageError and nothing else. Maps and extension types do not occur.
"""

from __future__ import annotations

import msgpack

from base.lean_typing import Any, Mapping, NamedTuple, Protocol, Sequence
from ipc.errors import MessageError

#: No frame of any channel is longer; also ZeroMQ's MAXMSGSIZE.
MAX_FRAME_SIZE = 256 << 10
#: No list in a message is longer. The parser reserves what a list declares before it has seen the values: with no
#: other limit than the frame's size, 1,000 lists in each other took 86 MiB and 0.2 s.
MAX_LIST_LENGTH = 1024
U8 = (1 << 8) - 1
U16 = (1 << 16) - 1
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


class Field:
    """Checks one value."""

    def check(self, value: Any, where: str) -> Any:
        """Return the value as it is handed to the receiver. Raises MessageError, which says where in ``where``."""
        try:
            return self.accept(value)
        except MessageError as error:
            raise MessageError(f"{where}{error}") from None

    def accept(self, value: Any) -> Any:
        """As :meth:`check`; the text begins with where in the value it is wrong. Names are built only then."""
        raise NotImplementedError


class Int(Field):
    """An integer within ``low`` … ``high``, both included (booleans are not integers here)."""

    def __init__(self, high: int, low: int = 0) -> None:
        self.low = low
        self.high = high

    def accept(self, value: Any) -> Any:
        if type(value) is not int:
            # We may send members of an IntEnum (signal.SIGKILL); a received value is a plain integer or wrong.
            if not isinstance(value, int) or type(value) is bool:
                raise MessageError(f": expected an integer from {self.low} to {self.high}")
            value = int(value)
        if not self.low <= value <= self.high:
            raise MessageError(f": expected an integer from {self.low} to {self.high}")
        return value


class Flag(Field):
    """True or False."""

    def accept(self, value: Any) -> Any:
        if type(value) is not bool:
            raise MessageError(": expected a boolean")
        return value


class Text(Field):
    """A string of at most ``size`` characters."""

    def __init__(self, size: int) -> None:
        self.size = size

    def accept(self, value: Any) -> Any:
        if type(value) is not str or len(value) > self.size:
            raise MessageError(f": expected a string of at most {self.size} characters")
        return value


class Bytes(Field):
    """A byte string of at most ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def accept(self, value: Any) -> Any:
        if type(value) is not bytes or len(value) > self.size:
            raise MessageError(f": expected at most {self.size} bytes")
        return value


class ListOf(Field):
    """A sequence of ``least`` to ``size`` values of one field type; handed on as a tuple."""

    def __init__(self, item: Field, size: int, least: int = 0) -> None:
        assert size <= MAX_LIST_LENGTH
        self.item = item
        self.size = size
        self.least = least

    def accept(self, value: Any) -> Any:
        if type(value) not in (list, tuple) or len(value) > self.size:
            raise MessageError(f": expected a list of at most {self.size} values")
        if len(value) < self.least:
            raise MessageError(f": expected a list of at least {self.least} values")
        accept = self.item.accept
        return tuple([accept(element) for element in value])


class RecordOf(Field):
    """A nested record: a NamedTuple class and the fields of its values."""

    def __init__(self, record: type[Any], **fields: Field) -> None:
        self.record = record
        self.fields = _ordered(record, fields)
        self._accept = tuple([field.accept for _, field in self.fields])
        #: Of a record of integers only (CPUID, MSRs, windows …): such come in long lists.
        self._bounds = _bounds([field for _, field in self.fields])

    def accept(self, value: Any) -> Any:
        if type(value) not in (list, tuple, self.record) or len(value) != len(self.fields):
            raise MessageError(f": expected a record of {len(self.fields)} values")
        if self._bounds:
            for element, (low, high) in zip(value, self._bounds, strict=True):
                if type(element) is not int or not low <= element <= high:
                    break  # wrong, or a member of an IntEnum
            else:
                return self.record._make(value)
        try:
            return self.record._make([accept(element) for accept, element in zip(self._accept, value, strict=True)])
        except MessageError:
            raise self._located(value) from None

    def _located(self, value: Sequence[Any]) -> MessageError:
        """Find the first field that is wrong again, to name it."""
        for (name, field), element in zip(self.fields, value, strict=True):
            try:
                field.accept(element)
            except MessageError as error:
                return MessageError(f".{name}{error}")
        raise AssertionError("a value was wrong and is not any more")


class Maybe(Field):
    """A value of another field, or None."""

    def __init__(self, field: Field) -> None:
        self.field = field

    def accept(self, value: Any) -> Any:
        return None if value is None else self.field.accept(value)


def _bounds(fields: Sequence[Field]) -> tuple[tuple[int, int], ...]:
    bounds = [(field.low, field.high) for field in fields if type(field) is Int]
    return tuple(bounds) if len(bounds) == len(fields) else ()


def _ordered(record: type[Any], fields: Mapping[str, Field]) -> tuple[tuple[str, Field], ...]:
    names: Sequence[str] = record._fields
    assert set(names) == set(fields), f"schema of {record.__name__} does not match its fields"
    return tuple((name, fields[name]) for name in names)


class Section(NamedTuple):
    """What a unit saves: declared beside the unit's code, and nowhere else (docs/formats/microvm-state.md).

    ``version`` changes with every change of fields, order or meaning. ``required``: a reader that does not know the
    section refuses the whole, else it leaves the section out.
    """

    name: str
    version: int
    fields: RecordOf
    required: bool = True


class Saveable(Protocol):
    """A unit that has a state. It is restored by its constructor, which takes what :meth:`save` has returned."""

    @property
    def SECTION(self) -> Section:
        """What it saves."""

    @property
    def instance(self) -> str:
        """Which of several units of one kind; "" if there can only be one."""

    def save(self) -> Any:
        """Return the record of ``SECTION.fields``. Changes nothing; only while the machine stands still."""


class Schema:
    """The messages that one channel may carry."""

    def __init__(self) -> None:
        self._by_kind: dict[int, RecordOf] = {}
        self._kinds: dict[type[Any], int] = {}

    def register(self, kind: int, record: type[Any], **fields: Field) -> None:
        """Add a message; ``kind`` is its number on the wire and never given to another one."""
        assert 0 < kind <= U8
        assert kind not in self._by_kind
        assert record not in self._kinds
        self._by_kind[kind] = RecordOf(record, **fields)
        self._kinds[record] = kind

    def kinds(self) -> dict[type[Any], int]:
        """Return the registered records and their numbers (for tests and documentation)."""
        return dict(self._kinds)

    def to_wire(self, message: Any) -> tuple[int, tuple[Any, ...]]:
        """Return (kind, checked values) of a message that we send ourselves."""
        kind = self._kinds.get(type(message))
        if kind is None:
            raise MessageError(f"{type(message).__name__} is not a message of this channel")
        return kind, tuple(self._by_kind[kind].check(message, type(message).__name__))

    def from_wire(self, kind: Any, values: Any) -> Any:
        """Return the message for a received kind and its values; raises MessageError."""
        record = self._by_kind.get(kind) if type(kind) is int else None
        if record is None:
            raise MessageError("unknown message kind")
        return record.check(values, record.record.__name__)


def pack(value: Any) -> bytes:
    """Serialise plain values. Raises MessageError if they cannot be serialised or the frame would be too long."""
    try:
        frame: bytes = msgpack.packb(value)
    except (ValueError, TypeError, OverflowError) as error:  # such as a lone surrogate of a file name in a text
        raise MessageError(f"cannot be serialised: {type(error).__name__}") from None
    if len(frame) > MAX_FRAME_SIZE:
        raise MessageError(f"frame of {len(frame)} bytes exceeds {MAX_FRAME_SIZE}")
    return frame


def unpack(frame: bytes | bytearray | memoryview) -> Any:
    """Parse one frame into plain values (lists, str, bytes, int, bool, None). Raises MessageError only."""
    if len(frame) > MAX_FRAME_SIZE:
        raise MessageError(f"frame of {len(frame)} bytes exceeds {MAX_FRAME_SIZE}")
    try:
        return msgpack.unpackb(
            frame, raw=False, max_array_len=MAX_LIST_LENGTH, max_ext_len=0, max_map_len=0, strict_map_key=True
        )
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise MessageError(f"malformed frame: {type(error).__name__}") from None


class Envelope(NamedTuple):
    """What surrounds a message on every channel.

    ``reply_to`` is the sequence number of the command that this message answers, 0 for none. ``deadline`` is
    CLOCK_MONOTONIC in nanoseconds, 0 for none.
    """

    epoch: int
    sequence: int
    reply_to: int
    deadline: int
    message: Any


#: Version of envelope and messages; a peer with another one is refused.
PROTOCOL_VERSION = 1


def encode(schema: Schema, envelope: Envelope) -> bytes:
    """Serialise an envelope with its message. Raises MessageError if the message breaks its own schema."""
    kind, values = schema.to_wire(envelope.message)
    return pack(
        (PROTOCOL_VERSION, envelope.epoch, envelope.sequence, envelope.reply_to, envelope.deadline, kind, values)
    )


_ENVELOPE_INTS = (Int(U64), Int(U64, 1), Int(U64), Int(U64))
_ENVELOPE_NAMES = ("epoch", "sequence", "reply_to", "deadline")


def decode(schema: Schema, frame: bytes | bytearray | memoryview) -> Envelope:
    """Parse a frame from a peer that is not trusted. Raises MessageError only."""
    parts = unpack(frame)
    if type(parts) is not list or len(parts) != 7:
        raise MessageError("an envelope has seven parts")
    if parts[0] != PROTOCOL_VERSION or type(parts[0]) is not int:
        raise MessageError(f"protocol version is not {PROTOCOL_VERSION}")
    for field, name, value in zip(_ENVELOPE_INTS, _ENVELOPE_NAMES, parts[1:5], strict=True):
        field.check(value, name)
    return Envelope(parts[1], parts[2], parts[3], parts[4], schema.from_wire(parts[5], parts[6]))
