"""The template: every import that a cell needs, made once before the jail is entered; late imports fail inside."""

from __future__ import annotations

import gc
import sys
import time

from base import native_loops
from base.lean_std import socket
from base.lean_typing import Callable, NamedTuple
from ipc import bounds
from ipc.launch_plan import FORKED_AHEAD, Assignment, LaunchPlan, Seal
from jailer import carried, hot, pack
from jailer.hot import heap


class Roles(NamedTuple):
    """The entry points of the cells; tests pass stand-ins. They return the exit code of the cell.

    ``ahead`` is the worker that the supervisor forks without being asked, if there is one. A device cell gets nothing
    of KVM; without an entry point for them there are none.
    """

    vmm: Callable[[LaunchPlan, socket.socket, Seal], int]
    vcpu: Callable[[LaunchPlan, Assignment, socket.socket, int, Seal], int]
    ahead: Assignment | None = None
    device: Callable[[LaunchPlan, Assignment, socket.socket, Seal], int] | None = None


def run_device_cell(plan: LaunchPlan, assignment: Assignment, channel: socket.socket, seal: Seal) -> int:
    """Run a device cell, whose code is carried: it is loaded now, behind the walls of the setup stage."""
    import device_cell.main

    return device_cell.main.run(plan, assignment, channel, seal)


def load_roles(*, kernel_cache: bool = False) -> Roles:
    """Import the cells' code; ``kernel_cache`` says whether a directory of unpacked kernels will be used."""
    import vcpu_worker.main
    import vmm.main

    native_loops.load()
    vmm.main.warm(kernel_cache=kernel_cache)
    carried.carry()
    return Roles(vmm.main.run, vcpu_worker.main.run, FORKED_AHEAD, run_device_cell)


_warmed = False


def warm() -> None:
    """Touch what Python and the C library load on first use, and arrange the heap so that forks share most of it.

    Called by a launch before its first fork; a template that waits for its launch has done it ahead. The garbage
    collector, off while the programs load their modules (which makes next to no garbage), is on from here.
    """
    global _warmed
    if _warmed:
        return
    _warmed = True
    for encoding in ("utf-8", "ascii", "latin-1"):
        "".encode(encoding)
    time.localtime()  # reads /etc/localtime, once
    sys.stdout.flush() if sys.stdout else None
    sys.stderr.flush() if sys.stderr else None
    pack.remove()
    # Its entries hold names: each one that a cell replaces would cost it a page, for the count of the old name.
    sys._clear_type_cache()
    heap.bound_threads(bounds.THREAD_STACK)
    heap.close_gaps()
    hot.gather_code()
    gc.freeze()
    gc.collect()  # nothing to traverse any more: empties the free lists of tuples, floats and the like
    gc.enable()
