"""A launch as data: a list of operations, each described, done, and undone in reverse when a later one fails."""

from __future__ import annotations

from base import threads, timeline
from base.errno_text import errno_text
from base.lean_typing import Callable, Iterable
from jailer.errors import JailerError, StepError


class Journal:
    """Hears of every change on the host before it is made, so that somebody else can take it back; this one forgets it.

    A change that was not made after all is told as well (:meth:`not_made`), and then the one before is the last.
    """

    __slots__ = ()

    def file(self, directory: int, name: str) -> None:
        """A file or a node will be made in a directory (descriptor)."""

    def directory(self, parent: int, name: str) -> None:
        """A directory will be made, which others may come to use."""

    def cgroup(self, parent: int, name: str) -> None:
        """A cgroup of this microVM alone will be made."""

    def owner(self, descriptor: int, uid: int, gid: int, mode: int) -> None:
        """This is the owner and the mode of a directory that will be changed."""

    def not_made(self) -> None:
        """The last change was not made."""


NO_JOURNAL = Journal()


class Step:
    """Around statements of a launch that are no operation: an OSError is told as "Failed to TEXT: …" (StepError)."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise StepError(f"Failed to {self._text}: {threads.explain(error)}") from None


class Operation:
    """One small change. ``step`` is the name that ``--without`` switches it off by ("" if it cannot be)."""

    __slots__ = ()
    step = ""

    def describe(self) -> str:
        """Say what ``do`` does, for the log and for error messages."""
        raise NotImplementedError

    def do(self) -> None:
        """Make the change. Raises StepError or OSError; then it has changed nothing."""
        raise NotImplementedError

    def undo(self) -> None:
        """Take back what ``do`` changed; nothing to do for what ends with the process. May raise OSError."""


class Plan:
    """Operations in order, and how far they were carried out."""

    def __init__(
        self,
        operations: Iterable[Operation],
        switched_off: frozenset[str] = frozenset(),
        log: Callable[[str], None] = print,
    ) -> None:
        self.operations = tuple(operations)
        self._switched_off = switched_off
        self._log = log
        self._done: list[Operation] = []

    def describe(self) -> list[str]:
        """Return one line per operation."""
        return [
            f"{operation.describe()}{' (switched off)' if operation.step in self._switched_off else ''}"
            for operation in self.operations
        ]

    def execute(self) -> None:
        """Carry out every operation; on a failure undo what was done and raise StepError."""
        for operation in self.operations:
            if operation.step in self._switched_off:
                continue
            timeline.mark(type(operation).__name__)
            try:
                operation.do()
            except OSError as error:
                self.undo()
                raise StepError(f"{operation.describe()}: {errno_text(error)}") from None
            except JailerError:
                self.undo()
                raise
            self._done.append(operation)

    def undo(self) -> None:
        """Undo what was done, in reverse; a failure is logged and the rest is still undone."""
        while self._done:
            operation = self._done.pop()
            try:
                operation.undo()
            except (OSError, JailerError) as error:
                self._log(f"could not undo {operation.describe()!r}: {error}")
