"""msgpack's compiled core without its Python layer: no message of ours has an extension type, or a time.

``import msgpack`` loads the types for these, and with them ``datetime`` and ``collections``: with what those bring
along, a twelfth of a cold start. :func:`install` registers stand-ins that refuse, and loads the core. The programs call
it before anything imports ``msgpack``; whoever does not gets the whole package, and the same behaviour:
tests/unit/base/test_lean_msgpack.py runs the messages' tests on both. A msgpack whose core wants more than these
stand-ins have is left to its own import.
"""

from __future__ import annotations

import sys

from base.lean_import import package_folder
from base.lean_typing import Any, NoReturn

_CORE = "msgpack._cmsgpack"
_STAND_INS = ("msgpack", "msgpack.ext")


class _Refused:
    """A type that no message has."""

    def __init__(self, *_: object) -> None:
        raise ValueError("extension types do not occur")

    @staticmethod
    def from_bytes(_: bytes) -> NoReturn:
        """What the core calls for a time that came."""
        raise ValueError("extension types do not occur")


def install() -> bool:
    """Make ``import msgpack`` mean the core from now on; False if msgpack is loaded already, or unknown to us."""
    if "msgpack" in sys.modules:
        return False
    folder = package_folder("msgpack")
    if folder is None:
        return False
    try:
        _load(folder)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name == "msgpack" or name.startswith("msgpack.")]:
            del sys.modules[name]
        return False
    return True


def _load(folder: str) -> None:
    package, extensions = (type(sys)(name) for name in _STAND_INS)
    package.__path__ = [folder]
    extensions.__dict__.update(ExtType=type("ExtType", (_Refused,), {}), Timestamp=type("Timestamp", (_Refused,), {}))
    sys.modules.update(zip(_STAND_INS, (package, extensions), strict=True))
    core = _import_core()
    exceptions = sys.modules["msgpack.exceptions"]

    def packb(value: object, **options: Any) -> Any:
        return core.Packer(**options).pack(value)

    package.__dict__.update(
        {name: value for name, value in vars(exceptions).items() if isinstance(value, type)},
        packb=packb,
        unpackb=core.unpackb,
    )


def _import_core() -> Any:
    """Import the core. It takes the C interface of ``datetime``, which is that of the module behind it."""
    lent = "datetime" not in sys.modules
    if lent:
        import _datetime  # type: ignore[import-not-found]

        sys.modules["datetime"] = _datetime
    try:
        return __import__(_CORE, fromlist=["Packer"])
    finally:
        if lent:
            del sys.modules["datetime"]
