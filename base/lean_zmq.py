"""pyzmq's compiled core without its Python layer: a third of a cold start's imports, and a megabyte of objects.

``import zmq`` loads forty modules (typing, json, pickle, random, platform, a thousand lines of enumerations) around
one compiled one, ``zmq.backend.cython._zmq``, that does all the work. :func:`install` registers stand-ins for the few
names that the core itself and the product use, and loads the core. The programs call it before anything imports
``zmq``; whoever does not (the unit tests, the benchmarks) gets the whole package, and the same behaviour:
tests/unit/base/test_lean_zmq.py runs the channel's tests on both.

Numbers: libzmq's zmq.h. A pyzmq whose core wants more than these stand-ins have is left to its own import.
"""

from __future__ import annotations

import sys
from errno import EAGAIN, EINTR

from base.lean_import import package_folder
from base.lean_typing import Any

PAIR = 0
FD = 14
EVENTS = 15
LINGER = 17
RECONNECT_IVL = 18
MAXMSGSIZE = 22
SNDHWM = 23
RCVHWM = 24
IPC_FILTER_UID = 59
DONTWAIT = 1
POLLIN = 1
POLLOUT = 2
ETERM = 156384712 + 53  # ZMQ_HAUSNUMERO + 53

_PACKAGES = ("zmq", "zmq.backend", "zmq.backend.cython")
_STAND_INS = (*_PACKAGES, "zmq.constants", "zmq.error")
_CORE = "zmq.backend.cython._zmq"


class ZMQError(Exception):
    """An error of libzmq: ``errno`` and ``strerror``."""

    def __init__(self, errno: int | None = None, msg: str | None = None) -> None:
        super().__init__()
        core: Any = sys.modules[_CORE]
        self.errno: int = core.zmq_errno() if errno is None else errno
        self.strerror: str = msg or core.strerror(self.errno)

    def __str__(self) -> str:
        return self.strerror


class Again(ZMQError):
    """EAGAIN: nothing to receive, or no room to send."""

    def __init__(self, _errno: object = None, _msg: object = None) -> None:
        super().__init__(EAGAIN)


class ContextTerminated(ZMQError):
    """ETERM: the context of the socket was ended."""

    def __init__(self, _errno: object = None, _msg: object = None) -> None:
        super().__init__(ETERM)


class InterruptedSystemCall(ZMQError):
    """EINTR."""

    def __init__(self, _errno: object = None, _msg: object = None) -> None:
        super().__init__(EINTR)


class _OptionType:
    """How wide the value of a socket option is; the core compares by identity."""

    int = "int"
    int64 = "int64"
    bytes = "bytes"
    fd = "fd"


class _Option:
    """What the core asks of a socket option's number; after a ValueError it takes the option for an int."""

    __slots__ = ("_opt_type",)
    _WIDE = {FD: _OptionType.fd, MAXMSGSIZE: _OptionType.int64}  # noqa: RUF012

    def __init__(self, number: int) -> None:
        if number not in self._WIDE:
            raise ValueError(number)
        self._opt_type = self._WIDE[number]


_NUMBERS = (
    "PAIR", "FD", "EVENTS", "LINGER", "RECONNECT_IVL", "MAXMSGSIZE", "SNDHWM", "RCVHWM", "IPC_FILTER_UID", "DONTWAIT",
    "POLLIN", "POLLOUT",
)  # fmt: skip


def install() -> bool:
    """Make ``import zmq`` mean the core from now on; False if zmq is loaded already, or another one than we know."""
    if "zmq" in sys.modules:
        return False
    folder = package_folder("zmq")
    if folder is None:
        return False
    try:
        _load(folder)
    except (ImportError, AttributeError):
        for name in (*_STAND_INS, _CORE):
            sys.modules.pop(name, None)
        return False
    return True


def _import_core() -> Any:
    """Import the core, without the modules of which it takes one name each for what we never ask of it.

    ``threading`` would cost 0.7 ms and 400 KiB at every fork of a cell; what is not loaded yet is not loaded now.
    """
    module_type = type(sys)
    lent = {"threading": {"Event": None}, "weakref": {"ref": None}}
    lent = {name: values for name, values in lent.items() if name not in sys.modules}
    for name, values in lent.items():
        sys.modules[name] = module_type(name)
        sys.modules[name].__dict__.update(values)
    try:
        return __import__(_CORE, fromlist=["Socket"])
    finally:
        for name in lent:
            del sys.modules[name]


def _load(folder: str) -> None:
    module_type = type(sys)
    modules = {name: module_type(name) for name in _STAND_INS}
    for name in _PACKAGES:
        modules[name].__path__ = [folder + name.removeprefix("zmq").replace(".", "/")]
    package = modules["zmq"]
    modules["zmq.constants"].__dict__.update(SocketOption=_Option, _OptType=_OptionType)
    errors = {each.__name__: each for each in (ZMQError, Again, ContextTerminated, InterruptedSystemCall)}
    modules["zmq.error"].__dict__.update(errors, _check_version=lambda *_: None)
    package.__dict__.update(
        errors,
        COPY_THRESHOLD=0,
        DRAFT_API=False,
        error=modules["zmq.error"],
        **{name: globals()[name] for name in _NUMBERS},
    )
    sys.modules.update(modules)
    core: Any = _import_core()

    class Socket(core.Socket):  # type: ignore[misc]
        """A socket with the names that pyzmq's own class adds."""

        setsockopt = core.Socket.set
        getsockopt = core.Socket.get

    class Context(core.Context):  # type: ignore[misc]
        """A context that makes sockets, and closes them when it is destroyed."""

        def __init__(self, io_threads: int = 1) -> None:
            super().__init__(io_threads)
            self._sockets: list[Socket] = []

        def socket(self, kind: int) -> Socket:
            """Make a socket."""
            made = Socket(self, kind)
            self._sockets = [each for each in self._sockets if not each.closed]
            self._sockets.append(made)
            return made

        def destroy(self, linger: int | None = None) -> None:
            """Close every socket, then end."""
            for each in self._sockets:
                each.close(linger)
            self._sockets.clear()
            self.term()

    package.__dict__.update(Socket=Socket, Context=Context)
