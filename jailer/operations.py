"""A launch as data: a list of operations, each described, done, and undone in reverse when a later one fails."""

from __future__ import annotations

from base import timeline
from base.errno_text import errno_text
from base.lean_typing import Callable, Iterable
from jailer.errors import JailerError, StepError


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
