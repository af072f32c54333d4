"""Guests that boot Debian from a drive of their own, and what is done to the disk beside them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lab.client import CHROOT_BASE, Jail, Microvm, descendants
from lab.guest_agent import Agent, Console
from lab.guest_agent import build as build_agent
from lab.guest_image import GuestImage
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, config, jail

#: Names of processes.
DEVICE_CELL = "device 0"
CONTROLLER = "vmm"


class Guest(NamedTuple):
    """A running guest with its agent."""

    jail: Jail
    microvm: Microvm
    agent: Agent

    def end(self) -> None:
        """Let its system go down in order, which ends the microVM (as a reset does on x86)."""
        self.agent.start("systemctl reboot")
        assert self.microvm.wait(180.0) == 0, self.microvm.tail()

    def cells(self, name: str) -> list[int]:
        """Return the pids of those cells whose process has this name."""
        found: list[int] = []
        for pid in descendants(self.microvm.process.pid):
            try:
                if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n":
                    found.append(pid)
            except OSError:
                continue  # it has ended
        return found

    def kill(self, name: str) -> None:
        """Kill the one cell of this name, as soon as there is one; wait until it is gone."""
        deadline = time.monotonic() + 60.0
        while not (found := self.cells(name)):
            assert time.monotonic() < deadline, f"there is no {name}: {self.microvm.tail()}"
            self.microvm.pump(0.01)
        (pid,) = found
        os.kill(pid, signal.SIGKILL)
        while pid in self.cells(name):
            assert time.monotonic() < deadline, f"{name} does not end"
            self.microvm.pump(0.01)


@contextmanager
def folder_of_disks(name: str) -> Iterator[Path]:
    """A folder for disks on the jails' file system: a jail is given one by a link, and leaves it when it ends."""
    folder = CHROOT_BASE / f"disks-{name}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def drive(disk: Path, *, root: bool = False, **more: Any) -> dict[str, Any]:
    """Return a drive of a configuration file on ``disk``; what the guest was told to be kept is kept."""
    shared = {"is_root_device": root, "is_read_only": False, "cache_type": "Writeback"}
    return {"drive_id": disk.stem, "path_on_host": disk, **shared, **more}


def empty_disk(path: Path, size: int) -> Path:
    """Make a file of zeros; return its path."""
    path.touch()
    os.truncate(path, size)
    return path


@contextmanager
def debian(
    name: str, image: GuestImage, disk: Path, machine: dict[str, Any], more: Sequence[dict[str, Any]] = ()
) -> Iterator[Guest]:
    """Boot Debian from ``disk``, its root device, to the login prompt, and log in. ``more``: further drives."""
    with _booted(name, image, machine, [drive(disk, root=True), *more]) as (made, microvm):
        microvm.expect(" login: ", 2 * BOOT_TIMEOUT, to_line_end=False)
        yield Guest(made, microvm, Agent.log_in(microvm, 120.0))


@contextmanager
def busybox(
    name: str, image: GuestImage, machine: dict[str, Any], drives: Sequence[dict[str, Any]], programs: Sequence[str]
) -> Iterator[Guest]:
    """Boot the guest image, which needs no disk, with these drives, and run the agent in it."""
    files = {"bin/cellblock-agent": build_agent().read_bytes()}
    with _booted(name, image, machine, drives, programs=programs, files=files, end="stay") as (made, microvm):
        microvm.expect("CELLBLOCK-READY", BOOT_TIMEOUT)
        console = Console(microvm)
        microvm.type("cellblock-agent\n")
        yield Guest(made, microvm, Agent(console))


@contextmanager
def _booted(
    name: str,
    image: GuestImage,
    machine: dict[str, Any],
    drives: Sequence[dict[str, Any]],
    *,
    end: str = "",
    **files: Any,
) -> Iterator[tuple[Jail, Microvm]]:
    with jail(name) as made:
        given = [
            {**each, "path_on_host": made.link(each["path_on_host"], each["path_on_host"].name)} for each in drives
        ]
        path = config(made, image, machine, "", end, drives=given, **files)
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as microvm:
            yield made, microvm


def file_system_is_clean(path: Path) -> str:
    """Have e2fsck look at an image, changing nothing; return what it says. Fails if it would repair anything."""
    done = subprocess.run(["e2fsck", "-f", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shown_in(path: Path, name: str) -> str:
    """Return what debugfs tells of a file in an image."""
    done = subprocess.run(["debugfs", "-R", f"stat {name}", path], capture_output=True, text=True, check=True)
    return done.stdout
