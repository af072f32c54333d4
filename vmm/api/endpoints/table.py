"""What a row of the API's table says, and what the files of the rows share: errors, ids in paths, words."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any, Callable, Final, NamedTuple
from vmm.errors import VmmError
from vmm.json.schema import REQUIRED

if TYPE_CHECKING:
    from vmm.json.schema import Type
    from vmm.json.text import JsonValue
    from vmm.session import Session

    #: Takes the session, the id in the path and the decoded body; returns what the client gets, None for nothing.
    Handler = Callable[[Session, str, Any], JsonValue]

BAD_JSON: Final = "An error occurred when deserializing the json body of a request: "
IDS_DIFFER: Final = "The id from the path does not match the id from the body!"
INTERNAL: Final = "Internal VMM error"


class RequestError(VmmError):
    """A request that is understood as HTTP, but is not one of the API; its text becomes the fault message."""

    code = "vmm.request"


class OperationError(VmmError):
    """An operation was refused or failed; the text is the whole fault message, ``status`` the HTTP status."""

    code = "vmm.operation"

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Endpoint(NamedTuple):
    """One operation of the API.

    ``path`` may end with an ``{id}``, which is checked before the body is looked at; further parts of a request's path
    do not count. A VmmError of a handler gets ``prefix`` and ``suffix`` around its text, an OperationError is complete.
    """

    method: str
    path: str
    #: Shape of the body; None: there is none, or none that counts.
    body: Type[Any] | None
    #: What is done before the start and after it; None: refused.
    before: Handler | None
    running: Handler | None
    prefix: str = ""
    suffix: str = ""
    #: Key in the request counters of the metrics, without _count and _fails.
    counted: str = ""
    #: Configures what a snapshot would bring along: none can be loaded any more.
    boot_specific: bool = False
    #: Of several rows with one path that count as one body: the value that asks for this one.
    choice: str = ""
    #: What stands for a body that is not sent.
    default: Any = REQUIRED
    #: Checks what the shape cannot say, given the path after its first part and the body. Raises RequestError.
    check: Callable[[list[str], Any], None] | None = None
    #: Says what is deprecated about a body; None: nothing.
    deprecation: Callable[[Any], str | None] | None = None
    #: Key of the operation's latency in the metrics, by which the log names it, too.
    timed: str = ""
    #: Key in the configuration file of what this configures.
    section: str = ""


def checked_id(text: str) -> str:
    """Return an id of a resource. Raises RequestError."""
    if not text:
        raise RequestError("The ID cannot be empty.")
    if not all(character == "_" or character.isalnum() for character in text):
        raise RequestError("API Resource IDs can only contain alphanumeric characters and underscores.")
    return text


def unknown_path(method: str, path: str) -> RequestError:
    """Return the error for a method and path that do not exist."""
    return RequestError(f"Invalid request method and/or path: {method} {path}.")


def unrecognized(method: str, part: str) -> RequestError:
    """Return the error for a part of a path that the resource does not have."""
    return RequestError(f"Unrecognized {method} request path `{part}`.")


def refuse_hotplug(_session: Session, _id: str, _body: Any) -> JsonValue:
    """Devices are attached and removed while the machine runs by way of the PCI transport only."""
    raise OperationError("PCI is not enabled")
