"""Modules that most microVMs do without: carried as byte code, and executed in the cell that uses them, when it does.

In a cell nothing can be imported from files, and loading every module ahead would make each start slower for a machine
without devices. So a launch takes the code of these modules along and executes none of it: docs/adr/carried-modules.md.
What they import of other packages has to be loaded by the template, or be carried itself.
"""

from __future__ import annotations

import marshal
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import SourceFileLoader
from posix import listdir

from base.lean_typing import TYPE_CHECKING, Iterator, Sequence
from jailer import pack

if TYPE_CHECKING:
    from types import ModuleType

#: Packages, with all that is below them, and single modules.
CARRIED = (
    "virtio",
    "device_cell",
    "vmm.devices.transport",
    "vmm.cells.device",
    "vmm.cells.device_cell",
    "vmm.cells.device_pool",
    "vmm.machine.device_cells",
    "vmm.machine.device_report",
    "vmm.machine.drives",
    "vmm.machine.virtio_devices",
    "ipc.messages.device",
)
_ROOT = __file__.rpartition("/jailer/")[0]
_SUFFIX = ".py"
_INIT = "__init__.py"


class CarriedFinder:
    """Finds the modules that are carried, and loads them."""

    def __init__(self) -> None:
        #: module → its source, is it a package, its code as marshalled.
        self._modules: dict[str, tuple[str, bool, bytes]] = {}

    def take(self, name: str, source: str, *, is_package: bool) -> None:
        """Take the code of a module along, unless it is loaded already. Raises OSError, SyntaxError."""
        if name in sys.modules:
            return
        code = pack.code_of(name)
        if code is None:  # the source was changed since ./dev setup, or there is no pack
            code = marshal.dumps(SourceFileLoader(name, source).get_code(name))
        self._modules[name] = (source, is_package, code)

    def names(self) -> tuple[str, ...]:
        """Return the modules that are carried and not loaded yet."""
        return tuple(name for name in self._modules if name not in sys.modules)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return how a module is loaded; None: it is not carried."""
        entry = self._modules.get(name)
        if entry is None:
            return None
        spec = ModuleSpec(name, self, origin=entry[0], is_package=entry[1])  # type: ignore[arg-type]
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(entry[0].rpartition("/")[0])
        return spec

    def create_module(self, _spec: ModuleSpec) -> None:
        """Let the interpreter make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's code."""
        source, _, code = self._modules[module.__name__]
        module.__file__ = source
        exec(marshal.loads(code), module.__dict__)  # noqa: S102  (what a loader does)


FINDER = CarriedFinder()


def carry() -> None:
    """Take everything along that is to be carried, and find it from here on. Raises OSError, SyntaxError."""
    for name, source in pack.below(CARRIED) or _on_disk():
        FINDER.take(name, source, is_package=source.endswith(f"/{_INIT}"))
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def _on_disk() -> list[tuple[str, str]]:
    return [each for name in CARRIED for each in _modules(name, f"{_ROOT}/{name.replace('.', '/')}")]


def _modules(name: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield the modules below a package with their sources, the package first; or the one module of that name."""
    try:
        entries = listdir(path)
    except OSError:
        try:
            entries = listdir(path.rpartition("/")[0])
        except OSError:
            entries = []
        if f"{path.rpartition('/')[2]}{_SUFFIX}" in entries:
            yield name, f"{path}{_SUFFIX}"
        return
    yield name, f"{path}/{_INIT}"
    for entry in sorted(entries):
        if entry.endswith(_SUFFIX) and entry != _INIT:
            yield f"{name}.{entry.removesuffix(_SUFFIX)}", f"{path}/{entry}"
        elif "." not in entry and not entry.startswith("__"):
            yield from _modules(f"{name}.{entry}", f"{path}/{entry}")
