"""What goes wrong in ``seccompiler``."""

from __future__ import annotations

from base.errors import CellblockError


class CompilerError(CellblockError):
    """The filters cannot be compiled: a text that says what is wrong, and where."""
