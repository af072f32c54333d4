"""What commands are answered with: the shape of a reply, what a failure says, and how a call waits for its result."""

from __future__ import annotations

from base.lean_typing import Any, Callable
from ipc.errors import IpcError
from ipc.messages.records import MAX_TEXT, Failed
from vcpu_worker.errors import WorkerError

#: Sends the answer to one command.
Reply = Callable[[Any], None]
#: Carries out one command; raises WorkerError or IpcError, or replies, at once or later.
Command = Callable[[Any, Reply], None]


def bind(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """Return ``function`` with its first arguments given: functools.partial without its import."""
    return lambda *rest: function(*first, *rest)


def text_of(error: Exception) -> str:
    """Return what a message says of an exception, at most MAX_TEXT characters."""
    return (str(error) or type(error).__name__)[:MAX_TEXT]


def failed(error: Exception) -> Failed:
    """Return the answer to a command that ended with ``error``."""
    code = error.code if isinstance(error, WorkerError | IpcError) else "worker.internal"
    return Failed(code, text_of(error))
