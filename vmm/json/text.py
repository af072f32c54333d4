"""Values as text the way Firecracker's clients and log readers know them: quoted strings, numbers, JSON.

The wire formats here are Rust's: ``{:?}`` of a string, and the compact JSON of serde_json.
"""

from __future__ import annotations

from _json import encode_basestring  # by itself: the json package loads re and six others at each start

from base.lean_typing import Final, TypeAlias
from vmm.errors import VmmError

#: What can be written as JSON.
JsonValue: TypeAlias = (
    "bool | int | float | str | list[JsonValue] | tuple[JsonValue, ...] | dict[str, JsonValue] | None"
)

#: Unicode's White_Space, which Rust's trim() takes away. str.strip() also takes the separators 0x1c to 0x1f.
WHITE_SPACE: Final = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)

_DEBUG_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0"}


def debug_string(text: str) -> str:
    """Return a string in double quotes with everything escaped that is not printable, on one line."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    parts = ['"']
    for character in text:
        escape = _DEBUG_ESCAPES.get(character)
        if escape is not None:
            parts.append(escape)
        elif character.isprintable():
            parts.append(character)
        else:
            parts.append(f"\\u{{{ord(character):x}}}")
    parts.append('"')
    return "".join(parts)


def float_text(value: float) -> str:
    """Return a finite number with a decimal point or an exponent: ``1.5``, ``3.0``, ``1.5e+20``, ``0.00001``."""
    text = repr(value)
    mantissa, separator, exponent = text.partition("e")
    if not separator:
        return text
    power = int(exponent)
    if power == -5:  # Python writes an exponent here already
        sign = "-" if mantissa.startswith("-") else ""
        return f"{sign}0.0000{mantissa.lstrip('-').replace('.', '')}"
    return f"{mantissa}e{power:+}"


def json_text(value: JsonValue) -> str:
    """Return compact JSON, keys in the order of the dictionary, text beyond ASCII as it is."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{encode_basestring(key)}:{json_text(item)}" for key, item in value.items()]) + "}"
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join([json_text(item) for item in value]) + "]"
    raise VmmError(f"{type(value).__name__} cannot be written as JSON")
