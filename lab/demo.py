"""The demo: a jailed microVM boots an unmodified Debian kernel, shows its cells, pauses, resumes and ends cleanly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from devtool.project import PYTHON, ROOT, say
from devtool.testing import has_hardware_paging
from lab.client import CHROOT_BASE, ClientError, Jail, Microvm, descendants, without_log

if TYPE_CHECKING:
    from lab.guest_image import GuestImage

MICROVM_ID = "demo"
UID = 10000
BOOT_ARGS = "console=ttyS0 reboot=k panic=1 quiet cellblock.end=stay"
BOOT_TIMEOUT = 300.0
PAUSE_SECONDS = 3.0
END_MARK = "CELLBLOCK-END"
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def main() -> int:
    """Run the demo here if this machine has KVM with nested paging, else inside the lab."""
    if os.environ.get("CELLBLOCK_LAB") == "1" or has_hardware_paging():
        try:
            return _demonstrate()
        except (ClientError, OSError, subprocess.SubprocessError) as error:
            say(f"error: the demo failed: {error}")
            return 1
    from lab.guest_image import ensure

    say("this host has no KVM with nested paging: the demo runs in the lab, an emulated machine that has it")
    ensure()  # outside, where the cache is kept
    command = [str(PYTHON), "-m", "lab", "--", str(PYTHON), "-m", "lab.demo"]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


def _demonstrate() -> int:
    from lab.guest_image import ensure

    image = ensure()
    with tempfile.NamedTemporaryFile(prefix="cellblock-demo-") as walls:
        before = _traces()
        _run(image, Path(walls.name))
        return _show_traces(before)


def _run(image: GuestImage, walls: Path) -> None:
    jail = Jail(MICROVM_ID, UID, UID)
    say(f"jail root: {jail.root}")
    kernel = jail.add(image.vmlinuz, "vmlinuz")
    initramfs = jail.add(image.initramfs, "initramfs")
    # fmt: off
    options = [
        "--cleanup", "--new-pid-ns", "--cgroup-version", "2" if _cgroup_v2() else "1",
        "--cgroup", "pids.max=64", "--resource-limit", "no-file=1024", "--wall-log", str(walls),
    ]
    # fmt: on
    say("$ " + " ".join(jail.command(options)))
    with jail.launch(options) as microvm:
        microvm.wait_for_api()
        for method, target, body in (
            ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 256}),
            ("PUT", "/boot-source", {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": BOOT_ARGS}),
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
        ):
            say(f"{method} {target} {body}")
            microvm.must(method, target, body)
        print(microvm.expect("CELLBLOCK-READY", BOOT_TIMEOUT), flush=True)
        _show_guest(microvm)
        _show_cells(jail)
        _show_walls(walls)
        _show_pause(microvm)
        say("the guest reboots, which ends the microVM")
        microvm.type("exit\n")
        print(microvm.expect("CELLBLOCK-DONE", 60.0), flush=True)
        pid = _supervisor_pid(jail)
        _wait_for_end(pid)


def _cgroup_v2() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _command(microvm: Microvm, line: str) -> str:
    """Run a shell command in the guest over the console; return its output."""
    microvm.type(f"{line}; echo CELLBLOCK-''END\n")  # the echo of what we type must not look like the end
    return without_log(microvm.expect(END_MARK, 120.0))


def _show_guest(microvm: Microvm) -> None:
    say("the guest is alive:")
    print(_command(microvm, "uname -a; cat /proc/uptime; head -2 /proc/meminfo; grep -m1 'model name' /proc/cpuinfo"))


def _supervisor_pid(jail: Jail) -> int:
    """Return the pid of the supervisor, which the jailer's parent wrote into the jail root."""
    return int((jail.root / "firecracker.pid").read_text())


def _show_cells(jail: Jail) -> None:
    say("its cells:")
    for pid in descendants(_supervisor_pid(jail)):
        print(describe_cell(pid))
    sys.stdout.flush()


def _show_walls(path: Path) -> None:
    """Show what the supervisor read back of each cell's walls before it let the cell go on."""
    say("its walls, as the supervisor has read them back:")
    for line in path.read_text().splitlines():
        if line.startswith('{"walls"'):
            report = json.loads(line)
            verdict = "as asked for" if report["verified"] else f"NOT as asked for: {report['differences']}"
            print(f"  {report['walls']}: {verdict}")
            for name, value in report["found"].items():
                print(f"    {name}: {json.dumps(value)}")
    sys.stdout.flush()


def describe_cell(pid: int) -> str:
    """Return some lines on one process, read from /proc by the host's root."""
    proc = Path(f"/proc/{pid}")
    status = _fields(proc / "status")
    own = [name for name in NAMESPACES if _link(proc / "ns" / name) != _link(Path("/proc/self/ns") / name)]
    cgroups = sorted({line.split(":", 2)[2] for line in _read(proc / "cgroup").splitlines()} - {"/"})
    memory = _fields(proc / "smaps_rollup")
    root = ", ".join(sorted(os.listdir(proc / "root"))) or "(empty)"
    rss, proportional, private = (memory.get(name, "?") for name in ("Rss", "Pss", "Private_Dirty"))
    lines = [
        (
            f"  {status['Name']}: pid {pid}, parent {status['PPid']}, uid {status['Uid'].split()[1]}, "
            f"threads {status['Threads']}"
        ),
        (
            f"    seccomp mode {status['Seccomp']} ({status.get('Seccomp_filters', '?')} filters), "
            f"no_new_privs {status['NoNewPrivs']}, effective capabilities {status['CapEff']}"
        ),
        f"    own namespaces: {', '.join(own)}",
        f"    cgroup: {', '.join(cgroups) or '/'}",
        f"    root directory: {root}",
        f"    memory: RSS {rss}, proportional {proportional}, private dirty {private}",
    ]
    return "\n".join(lines)


def _fields(path: Path) -> dict[str, str]:
    """Parse lines of the form ``Name: value``."""
    parts = (line.partition(":") for line in _read(path).splitlines())
    return {name: value.strip() for name, _, value in parts}


def _read(path: Path) -> str:
    return path.read_text()


def _link(path: Path) -> str:
    return os.readlink(path)


def _uptime(microvm: Microvm) -> float:
    output = _command(microvm, "cat /proc/uptime")
    numbers = [word for word in output.split() if word.replace(".", "", 1).isdigit()]
    return float(numbers[0])


def _show_pause(microvm: Microvm) -> None:
    first = _uptime(microvm)
    say(f"guest uptime {first} s; PATCH /vm Paused for {PAUSE_SECONDS} s")
    microvm.must("PATCH", "/vm", {"state": "Paused"})
    say(f"state: {microvm.must('GET', '/')['state']}")
    microvm.type("cat /proc/uptime; echo CELLBLOCK-''END\n")
    end = time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < end:
        microvm.pump(0.1)
    if microvm.has_come("proc/uptime"):
        raise ClientError("the paused guest answered on its console")
    say("the paused guest does not answer; PATCH /vm Resumed")
    microvm.must("PATCH", "/vm", {"state": "Resumed"})
    microvm.expect(END_MARK, 120.0)
    second = _uptime(microvm)
    say(f"state: {microvm.must('GET', '/')['state']}; guest uptime goes on: {second} s")
    if second <= first:
        raise ClientError(f"the guest's uptime did not go on: {first}, then {second}")


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30.0
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        if time.monotonic() > deadline:
            raise ClientError(f"the supervisor (pid {pid}) did not end")
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _traces() -> set[str]:
    """Return what a microVM could leave behind: processes, mounts, cgroups, sockets, files."""
    found = {f"process {pid}" for pid in descendants(os.getpid()) if pid != os.getpid()}
    found |= {f"mount {line.split()[4]}" for line in _read(Path("/proc/self/mountinfo")).splitlines()}
    found |= {f"socket {line.split()[-1]}" for line in _read(Path("/proc/net/unix")).splitlines() if "/" in line}
    for base in (Path("/sys/fs/cgroup"), CHROOT_BASE, Path("/run"), Path("/tmp")):
        for directory, names, files in os.walk(base):
            if base != Path("/sys/fs/cgroup"):
                found |= {f"file {directory}/{name}" for name in files}
            found |= {f"directory {directory}/{name}" for name in names}
    return found


def _show_traces(before: set[str]) -> int:
    deadline = time.monotonic() + 5.0
    while (left := _traces() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    expected = {f"directory {CHROOT_BASE}/firecracker"}
    left -= expected
    if left:
        say("left behind:\n  " + "\n  ".join(sorted(left)))
        return 1
    say("nothing is left: no process, mount, cgroup, socket or file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
