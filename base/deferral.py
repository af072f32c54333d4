"""What takes effect later, and who waits for it."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Deferral:
    """Something that was asked for and takes effect later: whoever asked waits until :meth:`complete`.

    A write of a vCPU, for example: the vCPU waits, and nobody else.
    """

    __slots__ = ("_then", "done")

    def __init__(self) -> None:
        self.done = False
        self._then: Callable[[], None] | None = None

    def complete(self) -> None:
        """It is in force. Called once."""
        assert not self.done
        self.done = True
        if self._then is not None:
            self._then()

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on completion."""
        assert not self.done
        assert self._then is None
        self._then = callback
