"""``signal``, ``socket`` and ``deque`` from the C modules behind the standard library's, which have the same functions.

The standard library's modules build a hundred enumeration members at import (with ``enum``, ``functools`` and
``selectors``: a tenth of a cold start), and wrap each call in conversions to them. Here a signal is a number.
A type checker sees the standard modules; what is not there: ``signal.Signals``, and of sockets ``makefile`` and others
that the product has no use for. ``collections`` is a millisecond of classes that nothing here uses.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal
    import socket
    from collections import deque
else:
    import _signal as signal
    import _socket
    import sys
    from _collections import deque

    class Socket(_socket.socket):
        """A socket with those of the additions of ``socket.socket`` that we use."""

        __slots__ = ()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def accept(self):
            """Return (connected socket, address of its other end)."""
            descriptor, address = self._accept()
            return Socket(fileno=descriptor), address

    def _socketpair(*kind):
        """Return two connected sockets."""
        return tuple([Socket(fileno=end.detach()) for end in _socket.socketpair(*kind)])

    socket = type(sys)("socket")
    socket.__dict__.update(vars(_socket))
    socket.socket = Socket
    socket.socketpair = _socketpair

#: Second names of signals that have a better known one.
_ALIASES = ("SIGCLD", "SIGIOT", "SIGPOLL")


def signal_name(number: int) -> str:
    """Return SIGKILL for 9 and so on; "real-time signal 40" for those without a name."""
    for name, value in vars(signal).items():
        if value == number and name.startswith("SIG") and "_" not in name and name not in _ALIASES:
            return name
    return f"real-time signal {number}"


__all__ = ["deque", "signal", "signal_name", "socket"]
