"""The supervisor's reading of what its cells write to standard error (jailer.cell_output)."""

from __future__ import annotations

import time

from jailer import cell_output
from jailer.cell_record import Cell
from jailer.log import Log


class Outputs:
    """The pipes of all cells of a microVM, in the supervisor's loop."""

    __slots__ = ("_cells", "_log")

    def __init__(self, cells: dict[int, Cell], log: Log) -> None:
        self._cells = cells
        self._log = log

    def due(self) -> list[int]:
        """Return the descriptors that are to be waited for."""
        outputs = [record.output for record in self._cells.values() if record.output is not None]
        return [output.descriptor for output in outputs if output.is_due()]

    def deadlines(self) -> list[float]:
        """Return when cells that were held back have to be read again (time.monotonic)."""
        outputs = [record.output for record in self._cells.values() if record.output is not None]
        return [time.monotonic() + output.wait() for output in outputs if output.is_held()]

    def pass_on(self, ready: set[int]) -> None:
        """Write on what cells wrote."""
        for record in self._cells.values():
            output = record.output
            if output is None or output.descriptor not in ready:
                continue
            was_limited = output.limited
            self._log.lost += cell_output.write(output.read())
            if output.limited and not was_limited:
                text = f"{record.name} (pid {record.pid}) writes too much to standard error: not all is read"
                self._log.warning(text)

    def ended(self, record: Cell) -> None:
        """Write on what a cell that has ended left."""
        if record.output is not None:
            self._log.lost += cell_output.write(record.output.drain())
            record.last_words = record.last_words or record.output.last_line
