"""Jail roots as the user of an earlier microVM may have left them, and a process of it that swaps names in one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.harness.jail import GID, UID, JailedMicrovm


class Victim:
    """A directory of the host with a file in it, bind-mounted in the jail root: nothing about it may change."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o755)
        self.file = directory / "file"
        self.file.write_text("of the host")
        self.file.chmod(0o666)  # or the kernel would not let others link to it
        self._before = self._state()

    def _state(self) -> list[tuple[int, int, int, str]]:
        paths = (self.directory, self.file)
        listed = ",".join(sorted(os.listdir(self.directory)))
        return [(s.st_mode, s.st_uid, s.st_gid, listed) for s in map(os.lstat, paths)]

    def assert_untouched(self) -> None:
        """Nothing of it was given away, written to, or added."""
        assert self._state() == self._before
        assert self.file.read_text() == "of the host"


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[None]:
    """Bind-mount a directory of the host."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        for point in mount_points():
            if point.name == target.name and target.parents[1] in point.parents:
                subprocess.run(["umount", point], check=True)  # it may have been moved along with its parent


def mount_points() -> set[Path]:
    """Return where something is mounted."""
    return {Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def give(path: Path) -> None:
    """Let everything from a path down belong to the user of the microVMs, but mounts and files with other names."""
    if path in mount_points() or (path.is_file() and path.stat().st_nlink > 1):
        return
    os.chown(path, UID, GID, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        for name in os.listdir(path):
            give(path / name)


def as_user(directory: Path, action: Callable[[], None]) -> None:
    """Run an action in a process of that user whose working directory this is; it has no way out of the test."""
    pid = _fork(directory, action)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _fork(directory: Path, action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(directory)
            os.setgroups([])
            os.setresgid(GID, GID, GID)
            os.setresuid(UID, UID, UID)
            action()
            status = 0
        finally:
            os._exit(status)
    return pid


#: What the racing process puts in the place of a name, by turns.
_RACED = ("dev", "run", "dev/net", "run/cellblock", "firecracker", "firecracker.pid", "dev/kvm")


def _swap(chance: random.Random) -> None:
    """Replace a random name by a link to the host's directory or file, by an honest directory, or by nothing."""
    name = chance.choice(_RACED)
    kind = chance.randrange(4)
    with suppress(OSError):
        os.rename(name, f"old-{chance.randrange(1 << 30)}")
    with suppress(OSError):
        if kind == 0:
            os.symlink("/data", name)
        elif kind == 1:
            os.symlink(os.path.relpath("data", os.path.dirname(name) or "."), name)
        elif kind == 2:
            os.link("spare/file", name)
        else:
            os.mkdir(name, 0o700)
    if kind == 2:
        with suppress(OSError):
            os.unlink(name)  # a file that is opened now has only its own name left


@contextmanager
def racing(root: Path, seed: int) -> Iterator[None]:
    """Have names in a jail root swapped until the end of the block."""

    def race() -> None:
        chance = random.Random(seed)
        while True:
            _swap(chance)

    pid = _fork(root, race)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _link(name: str, target: str) -> Callable[[], None]:
    def act() -> None:
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        os.symlink(target, name)

    return act


def _move_mount(name: str) -> Callable[[], None]:
    """Let a directory with the host's mount in it take the place of another one: no privilege is needed for that."""
    return lambda: os.rename("images", os.path.dirname(name))


#: What the earlier user did → where the host's directory is mounted, the act, and what the jailer says of it.
LOOP = "Symbolic link loop (os error 40)"
PREPARED: dict[str, tuple[str, Callable[[], None], str]] = {
    "dev is a link": ("data", _link("dev", "data"), f"Failed to change owner for /dev: {LOOP}"),
    "run is a link": ("data", _link("run", "/data"), f"Failed to change owner for /run: {LOOP}"),
    "dev/net is a link": ("data", _link("dev/net", "../data"), f"Failed to change owner for /dev/net: {LOOP}"),
    "run/cellblock is a link": (
        "data", _link("run/cellblock", "/data"), f"Failed to change owner for /run/cellblock: {LOOP}"
    ),
    "dev/net is a mount": (
        "images/net", _move_mount("dev/net"),
        "Failed to change owner for /dev/net: Cross-device link (os error 18)",
    ),
    "run/cellblock is a mount": (
        "images/cellblock", _move_mount("run/cellblock"),
        "Failed to change owner for /run/cellblock: Cross-device link (os error 18)",
    ),
    "run is a file of the host": (
        "data", lambda: os.link("spare/file", "run"), "Failed to change owner for /run: Not a directory (os error 20)"
    ),
}  # fmt: skip


def victim_in(jailed: JailedMicrovm, where: str, stack: ExitStack) -> Victim:
    """Make a directory of the host, mounted in the jail root; a link to its file is in the root as well."""
    victim = Victim(jailed.base.parent / "victim")
    jailed.root.mkdir(parents=True)
    stack.enter_context(mounted(victim.directory, jailed.root / where))
    (jailed.root / "spare").mkdir()
    os.link(victim.file, jailed.root / "spare/file")
    give(jailed.root)
    return victim
