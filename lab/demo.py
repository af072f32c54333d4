"""The demo: a jailed microVM boots Debian from its disk, writes, shows drive, cells and walls, pauses, ends cleanly."""

from __future__ import annotations

import hashlib
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
from lab.client import CHROOT_BASE, ClientError, Jail, Microvm, descendants
from lab.guest_agent import Agent

if TYPE_CHECKING:
    from lab.guest_disk import GuestDisk
    from lab.guest_image import GuestImage

MICROVM_ID = "demo"
UID = 10000
#: Without a network sshd is only waited for.
BOOT_ARGS = "console=ttyS0 reboot=k panic=1 quiet systemd.mask=ssh.service"
BOOT_TIMEOUT = 300.0
PAUSE_SECONDS = 3.0
#: What the guest was told to be kept is kept.
DRIVE = {"is_read_only": False, "cache_type": "Writeback"}
DISK = "root.ext4"
#: Written by the guest; looked up in the disk afterwards, from outside.
WRITTEN = "/var/tmp/written"
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def main() -> int:
    """Run the demo here if this machine has KVM with nested paging, else inside the lab."""
    if os.environ.get("CELLBLOCK_LAB") == "1" or has_hardware_paging():
        try:
            return _demonstrate()
        except (ClientError, OSError, subprocess.SubprocessError) as error:
            say(f"error: the demo failed: {error}")
            return 1
    say("this host has no KVM with nested paging: the demo runs in the lab, an emulated machine that has it")
    _images()  # outside, where the cache is kept
    command = [str(PYTHON), "-m", "lab", "--", str(PYTHON), "-m", "lab.demo"]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


def _images() -> tuple[GuestImage, GuestDisk]:
    from lab import guest_disk, guest_image

    return guest_image.ensure(), guest_disk.ensure()


def _demonstrate() -> int:
    image, disk = _images()
    CHROOT_BASE.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(prefix="cellblock-demo-") as walls,
        # On the jails' file system: a jail is given it by a link, and leaves it when it is removed.
        tempfile.TemporaryDirectory(prefix="cellblock-demo-", dir=CHROOT_BASE) as folder,
    ):
        own = disk.copy_to(Path(folder) / DISK)
        before = _traces()
        _run(image, disk, own, Path(walls.name))
        return _show_traces(before)


def _run(image: GuestImage, disk: GuestDisk, own: Path, walls: Path) -> None:
    """``own``: the microVM's copy of ``disk``."""
    jail = Jail(MICROVM_ID, UID, UID)
    say(f"jail root: {jail.root}")
    kernel = jail.add(image.vmlinuz, "vmlinuz")
    initramfs = jail.add(image.initramfs, "initramfs")
    root = jail.link(own, own.name)
    say(f"its disk: a copy of {disk.path}, a root file system of {len(disk.packages)} Debian packages")
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
            ("PUT", "/drives/root", {"drive_id": "root", "path_on_host": root, "is_root_device": True, **DRIVE}),
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
        ):
            say(f"{method} {target} {body}")
            microvm.must(method, target, body)
        print(microvm.expect(" login: ", BOOT_TIMEOUT, to_line_end=False), flush=True)
        agent = Agent.log_in(microvm)
        _show_guest(agent)
        written = _write(agent)
        _show_drive(microvm)
        _show_cells(jail)
        _show_walls(walls)
        _show_pause(microvm, agent)
        say("the guest's system goes down, which ends the microVM")
        pid = _supervisor_pid(jail)
        agent.start("systemctl reboot")
        _wait_for_end(microvm, pid)
    _show_disk(own, written)


def _cgroup_v2() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _show_guest(agent: Agent) -> None:
    say("the guest is alive:")
    shown = "uname -a; cat /proc/uptime; head -2 /proc/meminfo; grep -m1 'model name' /proc/cpuinfo; df -h /"
    print(agent.must(f"grep PRETTY_NAME /etc/os-release; {shown}"), flush=True)


def _write(agent: Agent) -> str:
    """Let the guest write to its disk and sync it; return the digest of what it wrote."""
    say(f"the guest writes 8 MiB to its disk, as {WRITTEN}, and waits until it is kept:")
    output = agent.must(f"dd if=/dev/urandom of={WRITTEN} bs=1M count=8 conv=fsync 2>&1; sync; sha256sum {WRITTEN}")
    print(output, flush=True)
    return output.split()[-2]


def _show_drive(microvm: Microvm) -> None:
    say("its drive, GET /devices:")
    for device in microvm.must("GET", "/devices"):
        for name, value in device.items():
            print(f"  {name}: {json.dumps(value)}")
    sys.stdout.flush()


def _show_disk(path: Path, written: str) -> None:
    """Check the file system from outside, and look for what the guest has written."""
    say("the disk afterwards, from outside:")
    check = subprocess.run(["e2fsck", "-f", "-n", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(check.stdout.decode(), flush=True)
    shown = subprocess.run(["debugfs", "-R", f"cat {WRITTEN}", path], capture_output=True, check=True).stdout
    if check.returncode != 0 or hashlib.sha256(shown).hexdigest() != written:
        raise ClientError(f"{path} is not clean, or does not hold what the guest has written")
    say(f"it is clean, and {WRITTEN} is what the guest wrote")


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


def _uptime(agent: Agent) -> float:
    return float(agent.must("cat /proc/uptime").split()[0])


def _show_pause(microvm: Microvm, agent: Agent) -> None:
    first = _uptime(agent)
    say(f"guest uptime {first} s; PATCH /vm Paused for {PAUSE_SECONDS} s")
    microvm.must("PATCH", "/vm", {"state": "Paused"})
    say(f"state: {microvm.must('GET', '/')['state']}")
    number = agent.start("cat /proc/uptime")
    end = time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < end:
        microvm.pump(0.1)
    if agent.output_so_far(number):
        raise ClientError("the paused guest answered on its console")
    say("the paused guest does not answer; PATCH /vm Resumed")
    microvm.must("PATCH", "/vm", {"state": "Resumed"})
    agent.wait(number)
    second = _uptime(agent)
    say(f"state: {microvm.must('GET', '/')['state']}; guest uptime goes on: {second} s")
    if second <= first:
        raise ClientError(f"the guest's uptime did not go on: {first}, then {second}")


def _wait_for_end(microvm: Microvm, pid: int) -> None:
    deadline = time.monotonic() + 90.0
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        if time.monotonic() > deadline:
            raise ClientError(f"the supervisor (pid {pid}) did not end:\n{microvm.tail()}")
        microvm.pump(0.05)


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
