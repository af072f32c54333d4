"""Which answers of a worker are expected, and by whom. Sans-IO: vmm.cells.worker asks it about all that comes."""

from __future__ import annotations

from base.lean_typing import Any, Callable


class Replies:
    """Keyed by the sequence number of the command."""

    def __init__(self) -> None:
        self._arrived: dict[int, Any] = {}
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._awaited: set[int] = set()
        #: Commands whose answer came too late for whoever asked; it may still come.
        self._abandoned: set[int] = set()

    def __len__(self) -> int:
        """How many answers are to be called back for."""
        return len(self._callbacks)

    def expect(self, sequence: int, callback: Callable[[Any], None] | None) -> None:
        """An answer goes to ``callback``, or is kept for :meth:`take`."""
        if callback is None:
            self._awaited.add(sequence)
        else:
            self._callbacks[sequence] = callback

    def arrive(self, sequence: int, message: Any) -> bool:
        """An answer has come. False: to nothing that was asked, or a second time."""
        callback = self._callbacks.pop(sequence, None)
        if callback is not None:
            callback(message)
        elif sequence in self._awaited and sequence not in self._arrived:
            self._arrived[sequence] = message
        elif sequence in self._abandoned:
            self._abandoned.discard(sequence)
        else:
            return False
        return True

    def has(self, sequence: int) -> bool:
        """Has the answer to this command come?"""
        return sequence in self._arrived

    def take(self, sequence: int) -> Any:
        """Return the answer that was waited for, or None: then it is not waited for any more."""
        self._awaited.discard(sequence)
        reply = self._arrived.pop(sequence, None)
        if reply is None:
            self._abandoned.add(sequence)
        return reply

    def drop_callbacks(self) -> None:
        """The worker has ended: nobody is called back any more."""
        self._callbacks.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._arrived.clear()
        self._callbacks.clear()
        self._awaited.clear()
        self._abandoned.clear()
