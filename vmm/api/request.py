"""What the routes of all features share: errors, the parsed request, decoding of bodies, ids in paths."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple, NoReturn
from vmm.errors import VmmError
from vmm.json import schema
from vmm.json.decoder import JsonError

if TYPE_CHECKING:
    from base.lean_typing import TypeVar
    from vmm.actions import Action

    T = TypeVar("T")

BAD_JSON = "An error occurred when deserializing the json body of a request: "


class RequestError(VmmError):
    """A request that is understood as HTTP, but is not one of the API; its text becomes the fault message."""

    code = "vmm.request"


class ParsedRequest(NamedTuple):
    """An action, and what is deprecated about the way it was asked for (None: nothing)."""

    action: Action
    deprecation: str | None = None


def decode_body(type_: schema.Type[T], body: bytes) -> T:
    """Return what a body says. Raises RequestError."""
    try:
        return schema.decode(type_, body)
    except JsonError as error:
        raise RequestError(f"{BAD_JSON}{error}.") from error


def path_id(rest: list[str]) -> str:
    """Return the id that follows the first part of a path. Raises RequestError."""
    return checked_id(rest[0] if rest else "")


def checked_id(text: str) -> str:
    """Return an id of a resource. Raises RequestError."""
    if not text:
        raise RequestError("The ID cannot be empty.")
    if not all(character == "_" or character.isalnum() for character in text):
        raise RequestError("API Resource IDs can only contain alphanumeric characters and underscores.")
    return text


def invalid_path(method: str, path: str) -> NoReturn:
    """Raise the error for a method and path that do not exist."""
    raise RequestError(f"Invalid request method and/or path: {method} {path}.")
