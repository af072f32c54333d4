"""Typed decoding of request bodies: what serde's derived decoders accept, with their words for what they refuse.

A type is an object with ``decode(reader)``. Types read the text as it comes, so that of several faults in a body the
same one is reported as by Firecracker.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar
from vmm.json.decoder import JsonError, Reader, UnplacedError, unexpected

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmm.json.text import JsonValue

    T_co = TypeVar("T_co", covariant=True)

    class Type(Protocol[T_co]):
        """Something that can be decoded."""

        def decode(self, reader: Reader) -> T_co:
            """Consume a value. Raises JsonError, or UnplacedError if the object around it decides on the position."""


T = TypeVar("T")
_QUOTE, _OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _MINUS = b'"{}[-'
_N, _T, _F = b"ntf"
_DIGITS: Final = frozenset(b"0123456789")


class Unsigned:
    """A whole number from 0 to ``maximum``; ``name`` is Rust's name of the type."""

    __slots__ = ("name", "maximum")

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.maximum = (1 << bits) - 1

    def decode(self, reader: Reader) -> int:
        """Consume a number."""
        byte = reader.peek_value()
        if byte != _MINUS and byte not in _DIGITS:
            reader.invalid_type(self.name)
        value = reader.number()
        if isinstance(value, float):
            raise reader.error(f"invalid type: {unexpected(value)}, expected {self.name}")
        if not 0 <= value <= self.maximum:
            raise reader.error(f"invalid value: {unexpected(value)}, expected {self.name}")
        return value


class Boolean:
    """``true`` or ``false``."""

    __slots__ = ()

    def decode(self, reader: Reader) -> bool:
        """Consume a boolean."""
        byte = reader.peek_value()
        if byte == _T:
            reader.word(b"true")
            return True
        if byte == _F:
            reader.word(b"false")
            return False
        return reader.invalid_type("a boolean")


class String:
    """A string; ``expected`` names it in errors."""

    __slots__ = ("expected",)

    def __init__(self, expected: str) -> None:
        self.expected = expected

    def decode(self, reader: Reader) -> str:
        """Consume a string."""
        if reader.peek_value() != _QUOTE:
            reader.invalid_type(self.expected)
        return reader.string()


class Option(Generic[T]):
    """A value or null. A field of this type may be absent."""

    __slots__ = ("inner",)

    def __init__(self, inner: Type[T]) -> None:
        self.inner = inner

    def decode(self, reader: Reader) -> T | None:
        """Consume a value or ``null``."""
        if reader.peek() == _N:
            reader.word(b"null")
            return None
        return self.inner.decode(reader)


class Variant:
    """One of several names, given as a string (or, as serde has it, as the only key of an object with value null)."""

    __slots__ = ("names",)

    def __init__(self, *names: str) -> None:
        self.names = names

    def decode(self, reader: Reader) -> str:
        """Consume a name."""
        byte = reader.peek_value()
        if byte == _QUOTE:
            return self._name(reader)
        if byte != _OPEN_OBJECT:
            raise reader.peek_error("expected value")
        reader.enter()
        if reader.peek_value() != _QUOTE:
            reader.invalid_type("variant identifier")
        name = self._name(reader)
        reader.colon()
        if reader.peek_value() != _N:
            reader.invalid_type("unit")
        reader.word(b"null")
        reader.depth -= 1
        byte_after = reader.peek()
        if byte_after != _CLOSE_OBJECT:
            raise reader.error("EOF while parsing an object" if byte_after is None else "expected value")
        reader.index += 1
        return name

    def _name(self, reader: Reader) -> str:
        name = reader.string()
        if name not in self.names:
            raise reader.error(f"unknown variant `{name}`, {one_of(self.names, 'variants')}")
        return name


class Converted(Generic[T]):
    """A string that a function turns into something else; it returns None for what it refuses with ``message``."""

    __slots__ = ("convert", "message")

    def __init__(self, convert: Callable[[str], T | None], message: str) -> None:
        self.convert = convert
        self.message = message

    def decode(self, reader: Reader) -> T:
        """Consume a string and convert it."""
        value = self.convert(STRING.decode(reader))
        if value is None:
            raise UnplacedError(self.message)
        return value


class List(Generic[T]):
    """A list of values of one type."""

    __slots__ = ("inner",)

    def __init__(self, inner: Type[T]) -> None:
        self.inner = inner

    def decode(self, reader: Reader) -> list[T]:
        """Consume a list."""
        if reader.peek_value() != _OPEN_LIST:
            reader.invalid_type("a sequence")
        reader.enter()
        items: list[T] = []
        try:
            while reader.next_element(first=not items):
                items.append(self.inner.decode(reader))
        except UnplacedError as error:
            _place(reader, error, reader.leave_list)
        reader.leave_list()
        return items


class StringMap:
    """An object with any keys whose values are strings. The last of several equal keys wins."""

    __slots__ = ()

    def decode(self, reader: Reader) -> dict[str, str]:
        """Consume an object."""
        if reader.peek_value() != _OPEN_OBJECT:
            reader.invalid_type("a map")
        reader.enter()
        values: dict[str, str] = {}
        first = True
        while (key := reader.next_key(first)) is not None:
            first = False
            reader.colon()
            values[key] = STRING.decode(reader)
        reader.leave_object()
        return values


class Anything:
    """Any JSON value."""

    __slots__ = ()

    def decode(self, reader: Reader) -> JsonValue:
        """Consume any value."""
        return reader.value()


#: Marks a field that must be there.
REQUIRED: Final[Any] = object()


class Field:
    """A field of an object: key, type, and what stands for it when it is absent (``REQUIRED``: an error).

    Without a default an ``Option`` may be absent from an object, not from a list that stands for one: a default, None
    too, is Firecracker's ``serde(default)``. An ``extension`` is a field that Firecracker does not have: lists of the
    known fields leave it out.
    """

    __slots__ = ("key", "type", "default", "list_default", "extension")

    def __init__(self, key: str, type_: Type[Any], default: Any = REQUIRED, *, extension: bool = False) -> None:
        self.key = key
        self.extension = extension
        self.type = type_
        self.default = None if default is REQUIRED and isinstance(type_, Option) else default
        self.list_default = default


class Object(Generic[T]):
    """An object with known fields, made into ``build(*values in the order of the fields)``.

    ``name`` is the name of Firecracker's type, which errors show. Unknown keys are refused unless ``ignore_unknown``.
    As with serde a list of the values in the order of the fields, without extensions, stands for the object, too.
    """

    __slots__ = ("name", "build", "fields", "ignore_unknown", "_by_key", "_known")

    def __init__(self, name: str, build: Callable[..., T], *fields: Field, ignore_unknown: bool = False) -> None:
        self.name = name
        self.build = build
        self.fields = fields
        self.ignore_unknown = ignore_unknown
        self._by_key = {field.key: number for number, field in enumerate(fields)}
        self._known = tuple(field.key for field in fields if not field.extension)

    def decode(self, reader: Reader) -> T:
        """Consume an object, or a list of its values."""
        byte = reader.peek_value()
        if byte == _OPEN_OBJECT:
            read, leave = self._fields, reader.leave_object
        elif byte == _OPEN_LIST:
            read, leave = self._elements, reader.leave_list
        else:
            reader.invalid_type(f"struct {self.name}")
        reader.enter()
        try:
            values = read(reader)
        except UnplacedError as error:
            _place(reader, error, leave)
        leave()
        return self.build(*values)

    def _elements(self, reader: Reader) -> list[Any]:
        values: list[Any] = []
        number = 0  # among the fields that are no extensions
        for field in self.fields:
            if field.extension:
                values.append(field.default)
                continue
            if reader.next_element(first=not number):
                values.append(field.type.decode(reader))
            elif field.list_default is REQUIRED:
                count = len(self._known)
                expected = f"struct {self.name} with {count} element{'' if count == 1 else 's'}"
                raise UnplacedError(f"invalid length {number}, expected {expected}")
            else:
                values.append(field.list_default)
            number += 1
        return values

    def _fields(self, reader: Reader) -> list[Any]:
        values: list[Any] = [_ABSENT] * len(self.fields)
        first = True
        while (key := reader.next_key(first)) is not None:
            first = False
            number = self._by_key.get(key)
            if number is None:
                if not self.ignore_unknown:
                    raise UnplacedError(f"unknown field `{key}`, {one_of(self._known, 'fields')}")
                reader.colon()
                reader.value()
                continue
            if values[number] is not _ABSENT:
                raise UnplacedError(f"duplicate field `{key}`")
            reader.colon()
            values[number] = self.fields[number].type.decode(reader)
        for number, field in enumerate(self.fields):
            if values[number] is _ABSENT:
                if field.default is REQUIRED:
                    raise UnplacedError(f"missing field `{field.key}`")
                values[number] = field.default
        return values


_ABSENT: Final = object()


def one_of(names: tuple[str, ...], what: str) -> str:
    """Return "expected …" for a choice of names."""
    quoted = [f"`{name}`" for name in names]
    if not quoted:
        return f"there are no {what}"
    if len(quoted) == 1:
        return f"expected {quoted[0]}"
    if len(quoted) == 2:
        return f"expected {quoted[0]} or {quoted[1]}"
    return f"expected one of {', '.join(quoted)}"


def _place(reader: Reader, error: UnplacedError, leave: Callable[[], None]) -> NoReturn:
    """Raise an error at the place where serde notices it: after it has tried to close the object around it."""
    try:
        leave()
    except JsonError:
        pass  # the first fault counts; this one only moved the cursor
    raise reader.error(str(error)) from None


def decode(type_: Type[T], data: bytes) -> T:
    """Decode a whole document. Raises JsonError."""
    reader = Reader(data)
    try:
        value = type_.decode(reader)
    except UnplacedError as error:
        raise reader.error(str(error)) from None
    reader.end()
    return value


U8: Final = Unsigned("u8", 8)
U16: Final = Unsigned("u16", 16)
U32: Final = Unsigned("u32", 32)
U64: Final = Unsigned("u64", 64)
USIZE: Final = Unsigned("usize", 64)
BOOLEAN: Final = Boolean()
STRING: Final = String("a string")
PATH: Final = String("path string")
STRING_MAP: Final = StringMap()
ANYTHING: Final = Anything()
