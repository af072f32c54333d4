"""What does not keep the rules of this folder yet. The lists only shrink: an entry that is not needed fails a test."""

from __future__ import annotations

#: Rooms of vmm/ that import a room which stands after them, or that have no place in the order.
ROOMS: set[tuple[str, str]] = set()

#: Packages that know more of others than the table allows.
PACKAGES: set[tuple[str, str]] = set()

#: Modules that import each other in a circle.
MODULE_CIRCLES: set[tuple[str, ...]] = set()

#: Members of one folder (files and folders) that import each other in a circle.
ROOM_CIRCLES: set[tuple[str, ...]] = set()

#: Files above 500 lines.
LONG_FILES: set[str] = set()

#: Functions above 60 lines, as ``path:name``.
LONG_FUNCTIONS: set[str] = set()

#: Files that run the event loop from within, though they are not the ones that may.
RUN_UNTIL: set[str] = set()

#: Files of a cell that open by name, though they are not the ones that may.
OPEN: set[str] = set()

#: Unit tests without a file of the product that they mirror.
UNMIRRORED: set[str] = set()

#: Test files that import another test file.
TEST_IMPORTS: set[tuple[str, str]] = set()
