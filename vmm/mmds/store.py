"""The content of the metadata service: one JSON value, bounded in size.

Objects are kept with their keys in order (by code point), which is how Firecracker shows them.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.errors import VmmError
from vmm.json.text import json_text

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

#: Versions of the service: V2 wants a token with every request.
V1 = "V1"
V2 = "V2"
#: Objects and lists may be nested less deeply than this, also after patches.
MAX_DEPTH = 128


class MmdsError(VmmError):
    """The content cannot be changed as asked; nothing was changed."""

    code = "vmm.mmds"


class MmdsLimitError(MmdsError):
    """The content would be larger than the limit."""

    code = "vmm.mmds_limit"

    def __init__(self) -> None:
        super().__init__("The MMDS patch request doesn't fit.")


class NotInitializedError(MmdsError):
    """There is no content that could be changed, or no data store that could have any."""

    code = "vmm.mmds_not_initialized"

    def __init__(self) -> None:
        super().__init__("The MMDS data store is not initialized.")


class NotFoundError(MmdsError):
    """There is nothing at a path."""

    code = "vmm.mmds_not_found"

    def __init__(self) -> None:
        super().__init__("The MMDS resource does not exist.")


class UnsupportedTypeError(MmdsError):
    """A value has no form in the text format of EC2's service."""

    code = "vmm.mmds_type"

    def __init__(self) -> None:
        super().__init__("Cannot retrieve value. The value has an unsupported type.")


class DataStore:
    """One JSON value; ``limit`` bounds its compact text, in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._value: JsonValue = None
        self._initialized = False

    @property
    def value(self) -> JsonValue:
        """The content; an empty object while there is none."""
        return {} if self._value is None else self._value

    def put(self, value: JsonValue) -> None:
        """Replace the content. Raises MmdsLimitError."""
        self._value = self._checked(value)
        self._initialized = True

    def patch(self, patch: JsonValue) -> None:
        """Merge a patch (RFC 7396) into the content. Raises NotInitializedError before a PUT, MmdsLimitError."""
        if not self._initialized:
            raise NotInitializedError
        self._value = self._checked(merge_patch(self._value, patch))

    def _checked(self, value: JsonValue) -> JsonValue:
        value = ordered(value)
        if len(json_text(value).encode(errors="replace")) > self.limit:
            raise MmdsLimitError
        return value

    def get(self, path: str, *, imds: bool) -> str:
        """Return what is at a path, as JSON or in EC2's text format. Raises NotFoundError, UnsupportedTypeError."""
        value = find(self._value, path.removesuffix("/"))
        return imds_text(value) if imds else json_text(value)


def ordered(value: JsonValue, depth: int = 0) -> JsonValue:
    """Return a value with the keys of all objects in order. Raises MmdsError if it is nested too deeply."""
    if depth >= MAX_DEPTH:
        raise MmdsError(f"The data is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, dict):
        return {key: ordered(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [ordered(item, depth + 1) for item in value]
    return value


def merge_patch(target: JsonValue, patch: JsonValue) -> JsonValue:
    """Return ``target`` after a JSON merge patch (RFC 7396, section 2); neither is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def find(value: JsonValue, pointer: str) -> JsonValue:
    """Return what a JSON pointer (RFC 6901) points at. Raises NotFoundError."""
    if not pointer:
        return value
    if not pointer.startswith("/"):
        raise NotFoundError
    for token in pointer[1:].split("/"):
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and _is_index(key) and int(key) < len(value):
            value = value[int(key)]
        else:
            raise NotFoundError
    return value


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10 and (key == "0" or key[0] != "0")


def imds_text(value: JsonValue) -> str:
    """Return a string as it is; of an object its keys, those of objects with a slash. Raises UnsupportedTypeError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise UnsupportedTypeError
    return "\n".join([f"{key}/" if isinstance(item, dict) else key for key, item in value.items()])
