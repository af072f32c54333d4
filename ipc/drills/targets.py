"""Whom an attack is aimed at: other processes of the microVM, or any process by its number."""

from __future__ import annotations

import errno
import os

from ipc.drills.calls import refuse

#: The supervisor sets it before it forks workers. The controller, which it forks before, attacks its parent.
controller_pid = 0
#: Who has forked this cell, as its forker knows itself: the cell may see other numbers.
_parent_pid = 0
_forker_pid = 0

#: The names that a drill may be aimed at; all else is a process id.
NAMES = ("self", "supervisor", "controller")


def _note_forker() -> None:
    global _forker_pid
    _forker_pid = os.getpid()


def _note_parent() -> None:
    global _parent_pid
    _parent_pid = _forker_pid


os.register_at_fork(before=_note_forker, after_in_child=_note_parent)  # a fork that is refused changes nothing


def neighbour() -> int:
    """Return the process id of another cell: the controller's, or for the controller the supervisor's."""
    return controller_pid or _parent_pid


def named(name: str) -> int:
    """Return the process id that a drill's target stands for. Raises OSError (ESRCH) if there is none."""
    pid = {"self": os.getpid(), "supervisor": _parent_pid, "controller": controller_pid}.get(name)
    if pid is None:
        pid = int(name)
    if pid <= 0:  # it would be the caller, or its whole group
        raise refuse(errno.ESRCH)
    return pid
