"""A launch of stand-in roles in which one system call fails, or a signal comes, and what is left of it on the host."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from devtool.project import PYTHON, ROOT
from tests.harness.jail import GID, PATIENCE_S, STAND_IN, UID, JailedMicrovm, id_of, wait_for
from tests.harness.leftovers import GRACE_SECONDS, Leftovers, reap_adopted
from tests.harness.system_call_faults import Strike, SystemCallFaults

#: A number that nothing on the way gives a meaning of its own, and how it is told.
ERROR = errno.EIO
TOLD = "I/O error (os error 5)"
#: What the supervisor cannot read back is a wall that is not there.
UNLIKE = ": walls differ: "
#: What is said of an error that nobody has a name for.
BARE = "jailer: I/O"
#: What the stand-in's controller says when its walls are closed: then the launch has succeeded.
LAUNCHED = "stand-in: sealed"
#: What is said at every end with an error, as Firecracker does.
END = "Firecracker exiting with error. exit_code="
#: The controller's exit code in a launch that succeeds.
CODE = 3
#: Their numbers in the order of their first calls: who starts the janitor and ends is 1.
LAUNCHER, JANITOR, CONTROLLER = 0, 2, 3
#: More equal calls than this in a row are the pieces of one thing: those in the middle are left out.
_RUN = 6


class Outcome(NamedTuple):
    """``lines`` is what was said of the failure, ``left`` what there is more or less than before."""

    code: int
    launched: bool
    lines: list[str]
    left: list[str]
    struck: str
    calls: dict[int, list[str]]

    def remains(self) -> list[str]:
        """Return what a launch leaves that it should not: processes and mounts never, the rest if it has failed."""
        return [each for each in self.left if not self.launched or each.startswith(("+process", "+mount"))]

    def complaints(self) -> list[str]:
        """Say what is wrong with a launch in which one call failed."""
        wrong = []
        if remains := self.remains():
            wrong.append(f"left behind: {remains}")
        if self.launched:
            return wrong
        if self.code != 1:
            wrong.append(f"exit code {self.code}")
        if len(self.lines) != 1 or not any(each in self.lines[0] for each in (TOLD, UNLIKE)) or BARE in self.lines[0]:
            wrong.append("not one line that says what failed, at what and why")
        return wrong


class Place:
    """A --chroot-base-dir of its own, as a client may have prepared it: it has put its kernel into the jail root."""

    def __init__(self, directory: Path, options: Sequence[str] = (), *, prepared: bool = False) -> None:
        directory.mkdir(mode=0o755)
        self._directory = directory
        self.base = directory / "base"
        self.base.mkdir(mode=0o755)
        self._options = (
            "--cgroup", "pids.max=90", "--parent-cgroup", f"{id_of(self.base)}-parent", *options
        )  # fmt: skip
        root = self.base / "firecracker" / id_of(self.base) / "root"
        if prepared:
            (root / "dev").mkdir(parents=True)
            (root / "kernel").write_text("kernel")
            for path in (root, root / "dev", root / "kernel"):
                os.chown(path, UID, GID)
            root.chmod(0o751)

    def launch(self, strike: Strike | None = None, told: int = 0) -> Outcome:
        """Launch once, and see what is left of it when everything has ended.

        ``told``: how often the janitor of a launch that succeeds is told something.
        """
        before = self._state()
        faults = SystemCallFaults(self._directory / "faults", strike)
        program = faults.command(PYTHON, "-IS", STAND_IN, str(ROOT))
        jailed = JailedMicrovm(self.base, *self._options, program=program, arguments=("exit-3", "wait"))
        with faults:
            jailed.start()
            code = jailed.process.wait(PATIENCE_S)
            ended = faults.wait_ended(PATIENCE_S)
        said = [*jailed.output().splitlines(), *jailed.log().splitlines()]
        launched = LAUNCHED in said or (told > 0 and _was_told(faults.calls.get(JANITOR, [])) == told)
        if not launched:
            with suppress(AssertionError):
                wait_for(lambda: self._state() == before, "what it was before", GRACE_SECONDS)
        after = self._state()
        left = [*(f"+{each}" for each in sorted(after - before)), *(f"-{each}" for each in sorted(before - after))]
        if not ended:
            left.append("+process")
        lines = [line for line in said if not line.startswith("stand-in:") and END not in line]
        return Outcome(code, launched, lines, left, faults.struck, faults.calls)

    def _state(self) -> set[str]:
        """Everything in scope, files with who may do what with them."""
        found = Leftovers([self.base], [id_of(self.base)]).snapshot()
        found = {each for each in found if not each.startswith("process")}  # of other launches at the same time, too
        for directory, folders, files in os.walk(self.base):
            for path in (directory, *(os.path.join(directory, each) for each in (*folders, *files))):
                with suppress(FileNotFoundError):  # removed by the janitor at this moment
                    status = os.lstat(path)
                    owner = f"{status.st_uid}:{status.st_gid}"
                    found.add(f"{path} {stat.filemode(status.st_mode)} {owner} {status.st_rdev}")
        return found

    def clear(self) -> None:
        """Remove what a launch that succeeded leaves to its client."""
        wait_for(self._remove_cgroups, "the cgroups to be removed")

    def _remove_cgroups(self) -> bool:
        """False while somebody is in one; a process that ends may be until it is reaped."""
        reap_adopted()
        found = sorted(Path("/sys/fs/cgroup").glob(f"*/{id_of(self.base)}*/**/"), reverse=True)
        for directory in found:
            with suppress(OSError):
                directory.rmdir()
        return not found


def _was_told(calls: list[str]) -> int:
    """Return how often the janitor was told something, -1 if it has taken something back."""
    return -1 if {"fchmod", "unlinkat"} & {*calls} else calls.count("recvmsg")


def strikes(calls: dict[int, list[str]]) -> list[tuple[int, int]]:
    """Return (process, number) of the calls that are tried: all, but for the middle of a row of equal ones."""
    chosen = []
    for process, names in calls.items():
        end = len(names)
        if process == CONTROLLER:
            end -= 2  # by them it hears that the launch has succeeded, and says so
        elif process == LAUNCHER:
            end -= names[::-1].index("sendmsg")  # by that it tells the janitor
        for at, name in enumerate(names[:end]):
            around = names[max(0, at - _RUN) : at + _RUN + 1]
            if len(around) < 2 * _RUN + 1 or set(around) != {name}:
                chosen.append((process, at + 1))
    return chosen
