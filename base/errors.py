"""The root of every package's exception tree."""

from __future__ import annotations


class CellblockError(Exception):
    """Base of every error that the product raises on purpose: a stable ``code``, and a text fit for a person."""

    code = "cellblock"


class ThreadError(CellblockError):
    """A thread cannot be made: a limit was reached."""

    code = "threads"


class FaultSpecError(CellblockError):
    """A fault specification that cannot be understood, or that names an unknown fault point."""

    code = "ipc.fault"
