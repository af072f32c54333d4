"""Launches jailed microVMs for the tests and looks at their cells from outside."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from devtool.project import LAUNCHERS, PYTHON, ROOT
from lab.client import Reply, request
from tests.guests.build import build
from tests.harness.leftovers import reap_adopted
from tests.harness.run_options import IN_LAB, SOAK

JAILER = LAUNCHERS / "jailer"
FIRECRACKER = LAUNCHERS / "firecracker"
STAND_IN = Path(__file__).resolve().parent / "stand_in.py"
UID, GID = 12345, 23456
#: A generous bound on what should take milliseconds. The first launch in a lab reads everything through 9p: half of it
#: on a busy host.
PATIENCE_S = 120.0 if IN_LAB else 30.0
#: What is to end has ended by then, the documentation says; asserted in soaks, which have the machine for themselves.
PROMISE_S = 1.0 if SOAK else PATIENCE_S


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = PATIENCE_S) -> Any:
    """Return the first true value of a condition; fails the test when it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out waiting for {what if isinstance(what, str) else what()}")
        time.sleep(0.005)
    return value


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def limits(pid: int) -> dict[str, list[str]]:
    """Return soft and hard limits by the names of /proc/PID/limits."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}


def namespace(pid: int | str, name: str) -> str:
    """Return the identity of a namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/{name}")


def children(pid: int) -> dict[str, int]:
    """Return the children of a process by name; one that ends meanwhile is left out."""
    found: dict[str, int] = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
    return found


def descriptors(pid: int) -> dict[int, str]:
    """Return what the descriptors of a process are; one that is closed meanwhile is left out."""
    found = {}
    for each in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[int(each)] = os.readlink(f"/proc/{pid}/fd/{each}")
    return found


def count_tun(pid: int) -> int:
    """Return how many descriptors of /dev/net/tun a process holds; one that is closed meanwhile is left out."""
    count = 0
    for each in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            count += os.stat(f"/proc/{pid}/fd/{each}").st_rdev == os.makedev(10, 200)
    return count


def is_alive(pid: int) -> bool:
    """Is there such a process, and is it more than a zombie?"""
    reap_adopted()
    try:
        return status(pid)["State"][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def id_of(base: Path, which: str = "") -> str:
    """Return the id of the microVM below a base directory, or of one of several: no other test has it at any time."""
    return f"{base.parent.name}-{which}" if which else base.parent.name


class JailedMicrovm:
    """One launch of ``jailer``; what it prints goes to a file."""

    def __init__(
        self,
        base: Path,
        *options: str,
        microvm_id: str = "",
        arguments: Sequence[str] = ("--exerciser",),
        exec_file: Path = FIRECRACKER,
        program: Sequence[str | Path] = (JAILER,),
        uid: int = UID,
        gid: int = GID,
    ) -> None:
        self.base = base
        self.id = microvm_id = microvm_id or id_of(base)
        self.uid = uid
        self.gid = gid
        self.directory = base / exec_file.name / microvm_id
        self.root = self.directory / "root"
        self.pid_file = self.root / f"{exec_file.name}.pid"
        self.api_socket = self.root / "run" / "firecracker.socket"
        self.wall_log = base.parent / f"{microvm_id}.walls"
        self.output_file = base.parent / f"{microvm_id}.output"
        # fmt: off
        self.command = [
            *map(str, program), "--id", microvm_id, "--exec-file", str(exec_file), "--uid", str(uid), "--gid", str(gid),
            "--chroot-base-dir", str(base), "--wall-log", str(self.wall_log), *options, "--", *arguments,
        ]
        # fmt: on
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The program that was started."""
        assert self._process is not None
        return self._process

    # ------------------------------------------------------------ launch

    def start(self, **popen: Any) -> JailedMicrovm:
        """Start the program; do not wait."""
        with self.output_file.open("wb") as output:
            popen = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **popen}
            self._process = subprocess.Popen(self.command, **popen)
        return self

    def run(self) -> int:
        """Start the program and return its exit status."""
        self.start()
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.destroy()

    def wait_up(self) -> JailedMicrovm:
        """Wait until the API answers."""

        def up() -> bool:
            if self.process.poll() not in (None, 0):
                raise AssertionError(f"the jailer ended with {self.process.returncode}:{self.describe()}")
            try:
                return self.api("GET", "/").status == 200
            except OSError:
                return False

        wait_for(up, "the API")
        return self

    def boot(self, guest: str = "spin", boot_args: str = "0", **machine: Any) -> JailedMicrovm:
        """Wait for the API and start a tiny guest; ``machine`` is what else its machine-config has."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self._process is None:
            self.add_guest(guest)
            self.start()
        self.wait_up()
        for method, target, body in (
            ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, **machine}),
            ("PUT", "/boot-source", {"kernel_image_path": "/kernel", "boot_args": boot_args}),
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
        ):
            reply = self.api(method, target, body)
            assert reply.status == 204, (target, reply.body, self.describe())
        return self

    def add_guest(self, guest: str) -> None:
        """Put a tiny guest into the jail root as /kernel."""
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.copy(build(guest), self.root / "kernel")
        (self.root / "kernel").chmod(0o644)

    def api(self, method: str, target: str, body: Any = None) -> Reply:
        """Send one API request."""
        return request(self.api_socket, method, target, body, timeout=PATIENCE_S)

    # ------------------------------------------------------------ look

    def printed(self) -> str:
        """Return what was printed."""
        return self.output_file.read_text(errors="replace")

    def output(self) -> str:
        """Return what was printed, without the names of the workers before their lines."""
        return re.sub(r"^(vcpu|device) \d+: ", "", self.printed(), flags=re.MULTILINE)

    def log(self) -> str:
        """Return the supervisor's lines for people."""
        lines = self.wall_log.read_text().splitlines() if self.wall_log.exists() else []
        return "\n".join(line for line in lines if not line.startswith("{"))

    def last_words(self) -> str:
        """Return the last line: the controller's, or, if it got no CPU for an orderly end, the supervisor's."""
        killed = "did not end in order; killed" in self.log()
        return (self.log() if killed else self.output()).splitlines()[-1]

    def describe(self) -> str:
        """Return all that it said."""
        return f"\n{self.output()}\n{self.log()}"

    def wall_records(self) -> dict[str, dict[str, Any]]:
        """Return the walls' report by cell: what it comes to, and under "stages" the line of each stage.

        A cell that has taken the place of another one is in the report instead of it.
        """
        lines = self.wall_log.read_text().splitlines() if self.wall_log.exists() else []
        cells: dict[str, dict[str, Any]] = {}
        for record in (json.loads(line) for line in lines if line.startswith('{"walls"')):
            before = cells.get(record["walls"])
            if before is None or before["pid"] != record["pid"]:
                cells[record["walls"]] = {**record, "stages": {record["stage"]: record}}
                continue
            before["stages"][record["stage"]] = record
            for name in ("asked", "found"):
                before[name] = {**before[name], **record[name]}
            before["differences"] = before["differences"] + record["differences"]
            before["verified"] = before["verified"] and record["verified"]
        return cells

    @property
    def pid(self) -> int:
        """The visible pid, from the pid file."""
        return int(self.pid_file.read_text())

    def cells(self) -> dict[str, int]:
        """Return every process of the microVM by name: supervisor, vmm, vcpu 0."""
        return {"supervisor": self.pid, **children(self.pid)}

    def wait_cells(self, *names: str) -> dict[str, int]:
        """Return the cells, once all the named ones are there and sealed, as far as they are without a guest."""

        def there() -> dict[str, int] | None:
            cells = self.cells()
            sealed = self.wall_records()
            ready = all(name in cells and _stage(name) in sealed.get(name, {"stages": ()})["stages"] for name in names)
            return cells if ready else None

        found: dict[str, int] = wait_for(there, lambda: f"cells {names}: {self.describe()}")
        return found

    # ------------------------------------------------------------ end

    def stop(self) -> int | None:
        """End the microVM by SIGTERM and return the exit status of the program that was started."""
        if self.pid_file.exists() and is_alive(self.pid):
            os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def destroy(self) -> None:
        """Make sure that nothing of it runs any more."""
        if self._process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        try:
            text = self.pid_file.read_text() if self.pid_file.is_file() else ""
            if text and is_alive(int(text)) and _is_locked(self.pid_file):
                os.kill(int(text), signal.SIGKILL)
        except FileNotFoundError:
            pass  # removed by the janitor at this moment: nothing runs


def _stage(name: str) -> str:
    """A worker is at its first stage until it is configured."""
    return "setup" if name.startswith("vcpu") else "running"


def _is_locked(pid_file: Path) -> bool:
    """Tell whether the supervisor of that jail lives, and hence still has this pid (pids are reused)."""
    with pid_file.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def microvm(base: Path, *options: str, **keywords: Any) -> Iterator[JailedMicrovm]:
    """Make a microVM that is gone at the end of the block."""
    jailed = JailedMicrovm(base, *options, **keywords)
    try:
        yield jailed
    finally:
        jailed.destroy()


def stand_in(base: Path, behaviour: str, *options: str, **keywords: Any) -> JailedMicrovm:
    """Make a launch with stand-in roles that behave as tests/harness/stand_in.py says."""
    keywords.setdefault("arguments", (behaviour,))
    return JailedMicrovm(base, *options, program=(PYTHON, "-IS", STAND_IN, str(ROOT)), **keywords)
