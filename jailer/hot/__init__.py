"""Which memory the cells share with the template: what they write to is gathered on few pages before the forks.

Every call of a function changes the reference counts of the function, its code and the names of attributes. The cells
run a few hundred of the functions that were imported, which lie scattered among thousands of objects that they never
touch; a page with one of them is copied for every cell. ``functions.txt`` lists the functions that the cells run, in
the order of their first call, those of several cells first (``./dev bench pages --record`` writes it). It is only a
hint: what is not in it works as well and costs a page, what is in it and does not exist is passed over.
"""

from __future__ import annotations

import sys

from base.lean_typing import Any

_FOLDER = __file__.rpartition("/")[0]
_Function = type(lambda: None)
_Code = type((lambda: None).__code__)
_names: list[str] = []
#: Freed, they would leave gaps between what is shared.
_originals: list[Any] = []


def _lines(name: str) -> list[str]:
    try:
        with open(f"{_FOLDER}/{name}", encoding="ascii") as file:
            return file.read().split("\n")
    except OSError:
        return []


def intern_names() -> None:
    """Make the names that hot functions use, side by side, before the modules that use them are loaded."""
    _names.extend(map(sys.intern, _lines("build/names.txt")))


def gather_code() -> None:
    """Give every hot function a copy of its code; the copies lie side by side."""
    functions = [function for function in map(_find, _lines("functions.txt")) if function is not None]
    _originals.extend([function.__code__ for function in functions])
    copies = [_copy(original) for original in _originals]
    for function, copy in zip(functions, copies, strict=True):
        function.__code__ = copy


def _find(name: str) -> Any:
    """Return the function ``module:qualified.name``, None if there is none."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        if found is None:
            return None
        found = getattr(found, "__dict__", {}).get(part)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        elif isinstance(found, property):
            found = found.fget
    return found if isinstance(found, _Function) else None


def _copy(code: Any) -> Any:
    return code.replace(
        co_name=sys.intern(code.co_name),
        co_qualname=sys.intern(code.co_qualname),
        co_consts=tuple([_copy(each) if isinstance(each, _Code) else each for each in code.co_consts]),
    )
