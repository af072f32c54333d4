"""Checks that a block of code leaves no process, mount, cgroup, socket or file behind."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None, use_errno=True)

#: How long what is ending may take to be gone.
GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.01


class Leftovers:
    """What is there now, within a scope: see the fixture `no_leftovers`."""

    def __init__(self, directories: Sequence[Path | str], names: Sequence[str]) -> None:
        self.directories = [os.path.realpath(directory) for directory in directories]
        self.names = tuple(names)

    @classmethod
    @contextmanager
    def watch(cls, *directories: Path | str, names: tuple[str, ...] = ()) -> Iterator[Leftovers]:
        """Compare before and after the block; raises AssertionError that lists what stayed behind."""
        leftovers = cls(directories, names)
        reaped_orphans_before = _set_subreaper(True)
        try:
            before = leftovers.snapshot()
            yield leftovers
            new = leftovers.wait_for_none(before)
        finally:
            _set_subreaper(reaped_orphans_before)
        assert not new, "left behind:\n  " + "\n  ".join(sorted(new))

    def wait_for_none(self, before: set[str]) -> set[str]:
        """Return what is new since `before`, once there is nothing or after the grace time."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (new := self.snapshot() - before) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return new

    def snapshot(self) -> set[str]:
        """Return one line per thing in scope."""
        return {*self._processes(), *self._mounts(), *self._cgroups(), *self._sockets(), *self._files()}

    def _processes(self) -> Iterator[str]:
        """Descendants of this process. Orphans of a pid namespace are reaped: its process 1 cannot end before."""
        reap_adopted()
        parents: dict[int, int] = {}
        states: dict[int, str] = {}
        commands: dict[int, str] = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            pid = int(entry)
            commands[pid] = text[text.index("(") + 1 : text.rindex(")")]
            states[pid], parent = text[text.rindex(")") + 2 :].split()[:2]
            parents[pid] = int(parent)
        ours = {os.getpid()}
        for _ in range(len(parents)):
            more = {pid for pid, parent in parents.items() if parent in ours} - ours
            if not more:
                break
            ours |= more
        for pid in sorted(ours - {os.getpid()}):
            if states[pid] == "Z":
                continue  # ended; its parent (subprocess, or nobody) has not asked yet
            yield f"process {pid} ({commands[pid]})"

    def _mounts(self) -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            point = line.split()[4].encode().decode("unicode_escape")
            if self._below(point):
                yield f"mount {point}"

    def _cgroups(self) -> Iterator[str]:
        if not self.names:
            return
        for directory, _, _ in os.walk("/sys/fs/cgroup"):
            if any(name in directory for name in self.names):
                yield f"cgroup {directory}"

    def _sockets(self) -> Iterator[str]:
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and (self._below(fields[7]) or any(name in fields[7] for name in self.names)):
                yield f"socket {fields[7]}"

    def _files(self) -> Iterator[str]:
        for top in self.directories:
            for directory, folders, files in os.walk(top):
                yield from (f"file {os.path.join(directory, name)}" for name in [*folders, *files])

    def _below(self, path: str) -> bool:
        return any(path == directory or path.startswith(directory + "/") for directory in self.directories)


def reap_adopted() -> None:
    """Reap the zombies that became our children because whoever started them was killed, as every init does.

    They are in a pid namespace below ours (so nothing of ours has started them and waits for them), whose process 1
    has ended only when they were reaped.
    """
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        if fields["State"][0] == "Z" and len(fields.get("NSpid", [])) > 1:
            os.waitpid(int(pid), os.WNOHANG)


def _set_subreaper(wanted: bool) -> bool:
    """Make orphaned descendants children of this process, so that none is out of sight; returns the setting before."""
    before = ctypes.c_int()
    if _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_GET_CHILD_SUBREAPER")
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    return bool(before.value)
