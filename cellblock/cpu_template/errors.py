"""What goes wrong in ``cellblock cpu-template``: a text that says what happened and what to do."""

from __future__ import annotations

from base.errors import CellblockError


class ToolError(CellblockError):
    """The command cannot be carried out."""


class DifferenceError(ToolError):
    """The command was carried out and found a difference; ``lines`` are all of them."""

    def __init__(self, summary: str, lines: list[str]) -> None:
        super().__init__("\n".join([summary, *lines]))
        self.lines = lines
