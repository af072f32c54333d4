"""From units to bytes and back: every unit's section, with its bounds, in frames (vmm.snapshot.state_file)."""

from __future__ import annotations

from base.lean_typing import Any, Iterable, NamedTuple
from ipc.errors import MessageError
from ipc.schema import Saveable, Section, pack, unpack
from vmm.snapshot import state_file
from vmm.snapshot.state_file import Frame, MicrovmStateError

#: Which section of which unit.
Key = tuple[str, str]


class Saved(NamedTuple):
    """A record that was saved by somebody else: by another cell, or from bytes. A Saveable."""

    SECTION: Section
    instance: str
    record: Any

    def save(self) -> Any:
        """Return the record."""
        return self.record


def collect(units: Iterable[Saveable]) -> bytes:
    """Return what all units save, as bytes. Raises MicrovmStateError if a value is out of its bounds."""
    return state_file.write([_frame(unit) for unit in units])


def _frame(unit: Saveable) -> Frame:
    name, version, fields, required = unit.SECTION
    try:
        content = pack(fields.check(unit.save(), name))
    except MessageError as error:
        raise MicrovmStateError(f"The section {name} {unit.instance} cannot be written: {error}") from None
    return Frame(name, unit.instance, version, required, content)


def parse(data: bytes, sections: Iterable[Section]) -> dict[Key, Any]:
    """Return the records of what was collected, by name of the section and instance.

    A section that is not among ``sections`` is left out if its writer allows that. Raises MicrovmStateError only.
    """
    known = {section.name: section for section in sections}
    records: dict[Key, Any] = {}
    for frame in state_file.read(data):
        section = known.get(frame.name)
        if section is None:
            if frame.required:
                raise MicrovmStateError(f"The section {frame.name} {frame.instance} is not known to this version.")
            continue
        if frame.version != section.version:
            raise MicrovmStateError(
                f"The section {frame.name} {frame.instance} has version {frame.version}, not {section.version}."
            )
        try:
            records[frame.name, frame.instance] = section.fields.check(unpack(frame.content), frame.name)
        except MessageError as error:
            raise MicrovmStateError(f"The section {frame.name} {frame.instance} is wrong: {error}") from None
    return records
