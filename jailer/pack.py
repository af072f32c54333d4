"""The product's byte code in one file, which a start reads instead of one file for each of 250 modules.

For each module the interpreter lists folders, opens the cached file, reads it in parts and asks for the source's time
(docs/adr/one-pack-of-byte-code.md). ``./dev setup`` writes the pack (devtool.bytecode). A module whose source has
another time or size than the pack says is left to the interpreter, and so is everything where there is no pack, or one
of another version.

Layout: MAGIC; the interpreter's own magic number of byte code (4 bytes); the length of the index (u32, little-endian);
the index, marshalled: module → (source, is it a package, st_mtime_ns and st_size of the source, offset, length); the
modules' code, marshalled, at those offsets from the end of the index. The file is trusted as the cached files beside
the sources are.
"""

from __future__ import annotations

import marshal
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER
from posix import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

#: Where ./dev setup writes it.
PATH = f"{__file__.rpartition('/jailer/')[0]}/build/product.pack"
MAGIC = b"CBPACK1\n"
_PREFIX = MAGIC + MAGIC_NUMBER
_INDEX = len(_PREFIX) + 4

#: module → source, is it a package, st_mtime_ns and st_size of the source, offset and length of its code
Index = dict[str, tuple[str, bool, int, int, int, int]]


def join(index: Index, code: bytes) -> bytes:
    """Return the content of a pack."""
    packed = marshal.dumps(index)
    return b"".join((_PREFIX, len(packed).to_bytes(4, "little"), packed, code))


class PackFinder:
    """Finds the modules of one pack, and loads them."""

    def __init__(self, index: Index, code: memoryview) -> None:
        self._index = index
        self._code = code

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return how a module is loaded; None: not from here."""
        if not self._has(name):
            return None
        source, is_package = self._index[name][:2]
        spec = ModuleSpec(name, self, origin=source, is_package=is_package)  # type: ignore[arg-type]
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(source.rpartition("/")[0])
        return spec

    def _has(self, name: str) -> bool:
        """Is the module in the pack as its source is now?"""
        entry = self._index.get(name)
        if entry is None:
            return False
        try:
            status = stat(entry[0])
        except OSError:
            return False
        return status.st_mtime_ns == entry[2] and status.st_size == entry[3]

    def below(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        """Return what the pack has of these packages and modules, with the sources."""
        prefixes = tuple([f"{name}." for name in names])
        return [(each, entry[0]) for each, entry in self._index.items() if each in names or each.startswith(prefixes)]

    def code_of(self, name: str) -> bytes | None:
        """Return the marshalled code of a module; None: it is not to be had from here."""
        if not self._has(name):
            return None
        offset, length = self._index[name][4:]
        return bytes(self._code[offset : offset + length])

    def forget(self) -> None:
        """Let go of everything: the modules that were loaded keep their finder."""
        self._index = {}
        self._code = memoryview(b"")

    def create_module(self, _spec: ModuleSpec) -> None:
        """Let the interpreter make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's code."""
        source, _, _, _, offset, length = self._index[module.__name__]
        module.__file__ = source
        exec(marshal.loads(self._code[offset : offset + length]), module.__dict__)  # noqa: S102  (what a loader does)


_installed: list[PackFinder] = []


def install(path: str = PATH) -> None:
    """Find modules in the pack first, if it is there and was made for this interpreter."""
    try:
        # Not mapped: mmap keeps a descriptor, which a launch closes with all that it does not know.
        with open(path, "rb") as file:
            content = memoryview(file.read())
    except OSError:
        return
    start = _INDEX + int.from_bytes(content[len(_PREFIX) : _INDEX], "little")
    if content[: len(_PREFIX)] != _PREFIX or len(content) < start:
        return
    try:
        index = marshal.loads(content[_INDEX:start])
    except (EOFError, ValueError, TypeError):
        return
    finder = PackFinder(index, content[start:])
    _installed.append(finder)
    sys.meta_path.insert(0, finder)


def below(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the modules of some packages that are in the pack, and their sources; none if there is no pack."""
    return [each for finder in _installed for each in finder.below(names)]


def code_of(name: str) -> bytes | None:
    """Return the marshalled code of a module out of the pack, before it is removed; None if it is not in it."""
    for finder in _installed:
        code = finder.code_of(name)
        if code is not None:
            return code
    return None


def remove() -> None:
    """Give the pack's memory back, once everything is loaded."""
    while _installed:
        finder = _installed.pop()
        sys.meta_path.remove(finder)
        finder.forget()
