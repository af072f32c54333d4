"""JSON text, read step by step by ``vmm.json.schema``, with the errors and positions that serde_json reports.

Clients compare these texts ("missing field `vcpu_count` at line 1 column 21"), and the standard library's decoder
knows neither the words nor the positions. Two positions occur: errors about what was read are at the last byte read,
errors about what comes next are at the byte after it. A column is the number of bytes since the start of the line.

Everything is bounded: input size (the reader holds all of it), nesting (128), and the length of numbers in errors.
"""

from __future__ import annotations

from base.lean_typing import Final, NoReturn
from vmm.errors import VmmError
from vmm.json.number import MAX_EXPONENT, scaled, significand
from vmm.json.text import JsonValue, debug_string, float_text

#: Objects and arrays may be nested less deeply than this.
RECURSION_LIMIT: Final = 128
_MIN_I64: Final = -(1 << 63)

_EOF_VALUE = "EOF while parsing a value"
_EOF_OBJECT = "EOF while parsing an object"
_EOF_LIST = "EOF while parsing a list"
_EOF_STRING = "EOF while parsing a string"
_EXPECTED_VALUE = "expected value"
_EXPECTED_IDENT = "expected ident"
_INVALID_NUMBER = "invalid number"
_NUMBER_RANGE = "number out of range"
_INVALID_ESCAPE = "invalid escape"
_HEX_END = "unexpected end of hex escape"
_LONE_SURROGATE = "lone leading surrogate in hex escape"
_CONTROL = "control character (\\u0000-\\u001F) found while parsing a string"

_QUOTE, _BACKSLASH, _MINUS, _COMMA, _COLON = b'"\\-,:'
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = b"{}[]"
_N, _T, _F, _U = b"ntfu"
_WHITESPACE = frozenset(b" \n\t\r")
_DIGITS = frozenset(b"0123456789")
_EXPONENT = frozenset(b"eE")
_SIMPLE_ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))


class JsonError(VmmError):
    """The text is not the JSON that was asked for. ``line`` and ``column`` count from 1."""

    code = "vmm.json"

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(f"{reason} at line {line} column {column}")
        self.reason = reason
        self.line = line
        self.column = column


class UnplacedError(Exception):
    """An error whose position is decided further out: serde places it after the object that it concerns."""


class Reader:
    """A cursor over JSON text. Methods consume what they name and raise JsonError."""

    __slots__ = ("data", "index", "depth")

    def __init__(self, data: bytes) -> None:
        self.data = data
        #: Index of the next byte.
        self.index = 0
        self.depth = 0

    # -- errors -------------------------------------------------------------------------------------------------------

    def error(self, reason: str) -> JsonError:
        """Return an error at the last byte read."""
        return self._at(reason, self.index)

    def peek_error(self, reason: str) -> JsonError:
        """Return an error at the byte that comes next."""
        return self._at(reason, min(len(self.data), self.index + 1))

    def _at(self, reason: str, index: int) -> JsonError:
        line_start = self.data.rfind(b"\n", 0, index) + 1
        return JsonError(reason, 1 + self.data.count(b"\n", 0, line_start), index - line_start)

    # -- structure ----------------------------------------------------------------------------------------------------

    def peek(self) -> int | None:
        """Skip white space and return the next byte without consuming it; None at the end."""
        data = self.data
        index = self.index
        while index < len(data) and data[index] in _WHITESPACE:
            index += 1
        self.index = index
        return data[index] if index < len(data) else None

    def peek_value(self) -> int:
        """Like ``peek``, where a value must come."""
        byte = self.peek()
        if byte is None:
            raise self.peek_error(_EOF_VALUE)
        return byte

    def end(self) -> None:
        """Check that nothing but white space is left."""
        if self.peek() is not None:
            raise self.peek_error("trailing characters")

    def enter(self) -> None:
        """Consume an opening brace or bracket."""
        self.depth += 1
        if self.depth >= RECURSION_LIMIT:
            raise self.peek_error("recursion limit exceeded")
        self.index += 1

    def next_key(self, first: bool) -> str | None:
        """Consume up to and including the next key of an object; None if the object ends (not consumed)."""
        byte = self.peek()
        if byte is None:
            raise self.peek_error(_EOF_OBJECT)
        if byte == _CLOSE_OBJECT:
            return None
        if byte == _COMMA and not first:
            self.index += 1
            byte = self.peek()
        elif not first:
            raise self.peek_error("expected `,` or `}`")
        if byte == _QUOTE:
            return self.string()
        if byte == _CLOSE_OBJECT:
            raise self.peek_error("trailing comma")
        raise self.peek_error(_EOF_VALUE if byte is None else "key must be a string")

    def colon(self) -> None:
        """Consume the colon after a key."""
        byte = self.peek()
        if byte != _COLON:
            raise self.peek_error(_EOF_OBJECT if byte is None else "expected `:`")
        self.index += 1

    def leave_object(self) -> None:
        """Consume the closing brace. Also used after an error inside the object, to find its position."""
        self.depth -= 1
        byte = self.peek()
        if byte == _CLOSE_OBJECT:
            self.index += 1
            return
        if byte is None:
            raise self.peek_error(_EOF_OBJECT)
        raise self.peek_error("trailing comma" if byte == _COMMA else "trailing characters")

    def next_element(self, first: bool) -> bool:
        """Consume up to the next element of a list; False if the list ends (not consumed)."""
        byte = self.peek()
        if byte is None:
            raise self.peek_error(_EOF_LIST)
        if byte == _CLOSE_LIST:
            return False
        if byte == _COMMA and not first:
            self.index += 1
            byte = self.peek()
        elif not first:
            raise self.peek_error("expected `,` or `]`")
        if byte == _CLOSE_LIST:
            raise self.peek_error("trailing comma")
        if byte is None:
            raise self.peek_error(_EOF_VALUE)
        return True

    def leave_list(self) -> None:
        """Consume the closing bracket."""
        self.depth -= 1
        byte = self.peek()
        if byte == _CLOSE_LIST:
            self.index += 1
            return
        if byte is None:
            raise self.peek_error(_EOF_LIST)
        if byte == _COMMA:
            self.index += 1
            if self.peek() == _CLOSE_LIST:
                raise self.peek_error("trailing comma")
        raise self.peek_error("trailing characters")

    # -- scalars ------------------------------------------------------------------------------------------------------

    def word(self, word: bytes) -> None:
        """Consume ``null``, ``true`` or ``false``, whose first byte was seen."""
        data = self.data
        self.index += 1
        for expected in word[1:]:
            if self.index >= len(data):
                raise self.error(_EOF_VALUE)
            self.index += 1
            if data[self.index - 1] != expected:
                raise self.error(_EXPECTED_IDENT)

    def string(self) -> str:
        """Consume a string, whose opening quote was seen."""
        data = self.data
        self.index += 1
        parts: list[bytes] = []
        while True:
            start = self.index
            end = data.find(b'"', start)
            escape = data.find(b"\\", start, end if end >= 0 else len(data))
            stop = escape if escape >= 0 else end if end >= 0 else len(data)
            part = data[start:stop]
            if part and min(part) < 0x20:
                self.index = start + next(offset for offset, byte in enumerate(part) if byte < 0x20) + 1
                raise self.error(_CONTROL)
            self.index = stop
            if stop == len(data):
                raise self.error(_EOF_STRING)
            parts.append(part)
            self.index += 1
            if stop != escape:
                break
            parts.append(self._escape())
        try:
            return b"".join(parts).decode()
        except UnicodeDecodeError:
            raise self.error("invalid unicode code point") from None

    def _escape(self) -> bytes:
        """Consume an escape sequence, whose backslash was consumed, and return what it stands for as UTF-8."""
        byte = self._next_in_string()
        simple = _SIMPLE_ESCAPES.get(byte)
        if simple is not None:
            return bytes((simple,))
        if byte != _U:
            raise self.error(_INVALID_ESCAPE)
        unit = self._hex_digits()
        if 0xDC00 <= unit <= 0xDFFF:
            raise self.error(_LONE_SURROGATE)
        if not 0xD800 <= unit <= 0xDBFF:
            return chr(unit).encode()
        for expected in (_BACKSLASH, _U):
            if self._next_in_string() != expected:
                raise self.error(_HEX_END)
        low = self._hex_digits()
        if not 0xDC00 <= low <= 0xDFFF:
            raise self.error(_LONE_SURROGATE)
        return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)).encode()

    def _next_in_string(self) -> int:
        if self.index >= len(self.data):
            raise self.error(_EOF_STRING)
        self.index += 1
        return self.data[self.index - 1]

    def _hex_digits(self) -> int:
        digits = self.data[self.index : self.index + 4]
        self.index += len(digits)
        if len(digits) < 4:
            raise self.error(_EOF_STRING)
        if not all(digit in b"0123456789abcdefABCDEF" for digit in digits):
            raise self.error(_INVALID_ESCAPE)
        return int(digits, 16)

    def number(self) -> int | float:
        """Consume a number, whose first byte (a digit or a minus) was seen.

        Whole numbers within u64 and i64 are int; all others are float, as serde_json has it, also ``-0``.
        """
        data = self.data
        negative = data[self.index] == _MINUS
        if negative:
            self.index += 1
            if self.index >= len(data):
                raise self.error(_EOF_VALUE)
        start = self.index
        first = data[start]
        self.index += 1
        if first not in _DIGITS:
            raise self.error(_INVALID_NUMBER)
        if first == _DIGITS_ZERO:
            if self._peek_byte() in _DIGITS:
                raise self.peek_error(_INVALID_NUMBER)
        else:
            self._skip_digits()
        digits = data[start : self.index]
        fraction = b""
        is_whole = True
        if self._peek_byte() == _POINT:
            is_whole = False
            self.index += 1
            start = self.index
            if not self._skip_digits():
                raise self.peek_error(_EOF_VALUE if self.index >= len(data) else _INVALID_NUMBER)
            fraction = data[start : self.index]
        number, power = significand(digits, fraction)
        if self._peek_byte() in _EXPONENT:
            is_whole = False
            power += self._exponent(number)
        if is_whole and not power and (not negative or 0 < number <= -_MIN_I64):
            return -number if negative else number
        value = scaled(number, power)
        if value == _INFINITY:
            raise self.error(_NUMBER_RANGE)
        return -value if negative else value

    def _exponent(self, number: int) -> int:
        """Consume the exponent of a number and return it, no larger than what makes it 0 or too large."""
        self.index += 1
        sign = self._peek_byte()
        if sign in _SIGNS:
            self.index += 1
        if self.index >= len(self.data):
            raise self.error(_EOF_VALUE)
        self.index += 1
        if self.data[self.index - 1] not in _DIGITS:
            raise self.error(_INVALID_NUMBER)
        exponent = self.data[self.index - 1] - _DIGITS_ZERO
        while (byte := self._peek_byte()) in _DIGITS:
            self.index += 1
            exponent = min(exponent * 10 + byte - _DIGITS_ZERO, MAX_EXPONENT + 1)
            if exponent > MAX_EXPONENT and number and sign != _MINUS:
                raise self.error(_NUMBER_RANGE)
        return -exponent if sign == _MINUS else exponent

    def _peek_byte(self) -> int:
        """Return the next byte, or 0 at the end."""
        return self.data[self.index] if self.index < len(self.data) else 0

    def _skip_digits(self) -> bool:
        data = self.data
        index = start = self.index
        while index < len(data) and data[index] in _DIGITS:
            index += 1
        self.index = index
        return index > start

    # -- any value ----------------------------------------------------------------------------------------------------

    def invalid_type(self, expected: str) -> NoReturn:
        """Consume the scalar that came instead of what was expected (nothing of a list or object), and raise."""
        byte = self.peek_value()
        if byte == _OPEN_LIST:
            found = "sequence"
        elif byte == _OPEN_OBJECT:
            found = "map"
        else:
            found = unexpected(self.scalar(byte))
        raise self.error(f"invalid type: {found}, expected {expected}")

    def scalar(self, byte: int) -> bool | int | float | str | None:
        """Consume a value that is neither list nor object and starts with ``byte``."""
        if byte == _QUOTE:
            return self.string()
        if byte == _MINUS or byte in _DIGITS:
            return self.number()
        if byte == _N:
            self.word(b"null")
            return None
        if byte == _T:
            self.word(b"true")
            return True
        if byte == _F:
            self.word(b"false")
            return False
        raise self.peek_error(_EXPECTED_VALUE)

    def value(self) -> JsonValue:
        """Consume any value. The last of several equal keys wins."""
        byte = self.peek_value()
        if byte == _OPEN_OBJECT:
            self.enter()
            result: dict[str, JsonValue] = {}
            while (key := self.next_key(first=not result)) is not None:
                self.colon()
                result[key] = self.value()
            self.leave_object()
            return result
        if byte == _OPEN_LIST:
            self.enter()
            items: list[JsonValue] = []
            while self.next_element(first=not items):
                items.append(self.value())
            self.leave_list()
            return items
        return self.scalar(byte)


_DIGITS_ZERO = ord("0")
_POINT = ord(".")
_SIGNS = frozenset(b"+-")
_INFINITY = float("inf")


def unexpected(value: bool | int | float | str | None) -> str:
    """Name a value the way serde does in "invalid type: …" and "invalid value: …"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{'true' if value else 'false'}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{float_text(value)}`"
    return f"string {debug_string(value)}"


def decode(data: bytes) -> JsonValue:
    """Return any JSON document as Python values. Raises JsonError."""
    reader = Reader(data)
    result = reader.value()
    reader.end()
    return result
