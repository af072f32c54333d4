"""The program ``jailer`` with stand-in roles, one wall of which is silently not built: ``sabotage.py ROOT WALL …``.

It stands for a defect, or for a kernel that does less than it says: the verification has to find it.
"""

from __future__ import annotations

import os
import sys

WALL = sys.argv.pop(2)
sys.path[:0] = [sys.argv[1], os.path.join(sys.argv[1], ".venv/lib/python3.11/site-packages")]

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from jailer import bounds, syscalls  # noqa: E402
from jailer.steps import identity, process  # noqa: E402
from tests.harness import stand_in  # noqa: E402  takes the other arguments


def _nothing(*arguments: Any) -> None:
    pass


def _without_flag(flag: int) -> Callable[[int], None]:
    unshare = syscalls.unshare

    def less(flags: int) -> None:
        if flags & ~flag:
            unshare(flags & ~flag)

    return less


def _extra_group() -> None:
    setgroups = os.setgroups
    os.setgroups = lambda groups: setgroups([4242] if os.getpid() == 1 else groups)  # the controller


SABOTAGE: dict[str, Callable[[], None]] = {
    "uid": lambda: setattr(os, "setresuid", _nothing),
    "gid": lambda: setattr(os, "setresgid", _nothing),
    "groups": _extra_group,
    "capabilities": lambda: setattr(identity, "clear_bounding_set", _nothing),
    "no_new_privs": lambda: setattr(identity, "set_no_new_privileges", _nothing),
    "ipc": lambda: setattr(syscalls, "unshare", _without_flag(syscalls.CLONE_NEWIPC)),
    "uts": lambda: setattr(syscalls, "unshare", _without_flag(syscalls.CLONE_NEWUTS)),
    "core": lambda: setattr(identity, "forbid_core_files", _nothing),
    "processes": lambda: setattr(identity, "forbid_processes", _nothing),
    "bounds": lambda: setattr(bounds, "apply", _nothing),
    "open-files": lambda: setattr(process.SetLimits, "do", _nothing),
}

SABOTAGE[WALL]()
sys.exit(stand_in.run())
