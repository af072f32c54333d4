"""The optional C extension: mapped by the template, for a cell in its jail can map nothing executable.

``./dev setup`` builds it where a C compiler is (devtool.native). Who can use it asks for :func:`loops`, and does the
same in Python where there is none (docs/adr/block-loop-in-c.md).
"""

from __future__ import annotations

import sys
from _frozen_importlib import ModuleSpec
from _imp import create_dynamic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

#: Where ./dev setup writes it: only for the interpreter that it was built for.
PATH = f"{__file__.rpartition('/base/')[0]}/build/native/_loops.{sys.implementation.cache_tag}.so"

_loaded: ModuleType | None = None


def load(path: str = PATH) -> ModuleType | None:
    """Map the extension, once; None where there is none, or not one that fits. Not possible in a jail."""
    global _loaded
    if _loaded is None:
        try:
            _loaded = create_dynamic(ModuleSpec("_loops", None, origin=path))
        except ImportError:
            pass
    return _loaded


def loops() -> ModuleType | None:
    """Return the extension if it was loaded."""
    return _loaded
