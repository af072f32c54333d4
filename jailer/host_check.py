"""Can this host run jailed microVMs, what is missing, and how to mend it? Launches nothing.

``jailer --check`` and ``cellblock check`` say the same (docs/adr/host-tools-use-the-products-code.md).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from base.errno_text import errno_text
from jailer import landlock, placement, syscalls
from jailer.errors import JailerError
from jailer.settings import DEFAULT_NO_FILE
from jailer.steps import cgroups, rootless

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_CHECK_EXTENSION = 0xAE03
_KVM_API_VERSION = 12
#: Capabilities of KVM that a worker's VM cannot do without (linux/kvm.h).
_EXTENSIONS = {
    "KVM_CAP_USER_MEMORY": 3,
    "KVM_CAP_IRQFD": 32,
    "KVM_CAP_IOEVENTFD": 36,
    "KVM_CAP_READONLY_MEM": 81,
    "KVM_CAP_SPLIT_IRQCHIP": 121,
    "KVM_CAP_X2APIC_API": 129,
    "KVM_CAP_IMMEDIATE_EXIT": 136,
}
MINIMUM_KERNEL = (5, 10)

GOOD = "ok"
WORSE = "note"
BAD = "MISSING"


class Finding(NamedTuple):
    """One line of the report: ``state`` is GOOD, WORSE (works, but not as well) or BAD."""

    topic: str
    state: str
    text: str
    remedy: str = ""


def check_kernel() -> Finding:
    """Is the kernel new enough (openat2, close_range, mount API, seccomp TSYNC_ESRCH)?"""
    release = os.uname().release
    numbers = [int(part) if part.isdecimal() else 0 for part in release.replace("-", ".").split(".")[:2]]
    if tuple(numbers) < MINIMUM_KERNEL:
        return Finding("kernel", BAD, f"Linux {release}", "Linux 5.10 or newer is needed")
    return Finding("kernel", GOOD, f"Linux {release}")


def check_kvm(path: str = "/dev/kvm") -> list[Finding]:
    """Can KVM be opened, and make a VM with what a worker needs?"""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedies = {
            errno.ENOENT: "load kvm_intel or kvm_amd; in a virtual machine, enable nested virtualisation",
            errno.EACCES: f"allow access to {path} (jailer needs root; else: the group that owns it)",
        }
        return [Finding("kvm", BAD, f"{path}: {errno_text(error)}", remedies.get(error.errno or 0, ""))]
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        if version != _KVM_API_VERSION:
            return [Finding("kvm", BAD, f"API version {version}", f"KVM API {_KVM_API_VERSION} is needed")]
        missing = [name for name, number in _EXTENSIONS.items() if not _extension(descriptor, number)]
        if missing:
            return [Finding("kvm", BAD, f"lacks {', '.join(missing)}", "a newer kernel")]
        os.close(fcntl.ioctl(descriptor, _KVM_CREATE_VM, 0))
    except OSError as error:
        return [Finding("kvm", BAD, f"cannot make a VM: {errno_text(error)}", "is the CPU in use otherwise?")]
    finally:
        os.close(descriptor)
    return [Finding("kvm", GOOD, f"{path} makes VMs, API version {version}")]


def _extension(descriptor: int, number: int) -> int:
    return fcntl.ioctl(descriptor, _KVM_CHECK_EXTENSION, number)


def check_placement() -> Finding:
    """One worker per vCPU, or grouped?"""
    found = placement.detect()
    if found.kind == "split":
        return Finding("placement", GOOD, f"split: one worker per vCPU ({found.reason})")
    remedy = "hardware second-stage paging (EPT or NPT) lets every vCPU have a process of its own"
    return Finding("placement", WORSE, f"grouped: the vCPUs of a microVM share a worker ({found.reason})", remedy)


def check_privileges() -> Finding:
    """Is this root, with the capabilities that a jail is built with?"""
    needed = {"CAP_CHOWN": 0, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    missing = [name for name, number in needed.items() if not effective >> number & 1]
    if not missing:
        return Finding("privileges", GOOD, "can build a jail")
    if rootless.is_needed() and _child_succeeds(partial(syscalls.unshare, syscalls.CLONE_NEWUSER)):
        found = "no root: a jail is built in a user namespace, the cells stay who you are"
        return Finding("privileges", WORSE, found, "docs/jailer.md says what a rootless jail goes without")
    remedy = f"{rootless.REMEDY}; or start firecracker without a jail"
    return Finding("privileges", BAD, f"lacks {', '.join(missing)}", remedy)


def check_namespaces() -> Finding:
    """Can the namespaces of a jail be made? Tried in a child."""
    flags = {
        "mount": syscalls.CLONE_NEWNS,
        "ipc": syscalls.CLONE_NEWIPC,
        "uts": syscalls.CLONE_NEWUTS,
        "network": syscalls.CLONE_NEWNET,
        "process": syscalls.CLONE_NEWPID,
    }
    own = syscalls.CLONE_NEWUSER if rootless.is_needed() else 0  # what holds the others, without root
    missing = [name for name, flag in flags.items() if not _child_succeeds(partial(syscalls.unshare, own | flag))]
    if missing:
        remedy = "a kernel with these namespaces; in a container, CAP_SYS_ADMIN and a permissive seccomp profile"
        return Finding("namespaces", BAD, f"cannot make: {', '.join(missing)}", remedy)
    return Finding("namespaces", GOOD, ", ".join(flags))


def check_mounts() -> Finding:
    """Does the mount API work that roots are made with (fsopen, open_tree, mount_setattr)?"""

    def attempt() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        quiet = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
        os.close(syscalls.mount_detached("tmpfs", (("size", "4k"),), quiet))
        os.close(syscalls.mount_detached("proc", (("subset", "pid"),), quiet))

    if _child_succeeds(attempt):
        return Finding("mounts", GOOD, "tmpfs and proc can be mounted")
    return Finding("mounts", BAD, "tmpfs or proc cannot be mounted", "in a container: run it privileged")


def check_seccomp() -> Finding:
    """Does the kernel know the actions that the filters use?"""
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="ascii") as file:
            actions = file.read().split()
    except OSError:
        return Finding("seccomp", BAD, "not in this kernel", "a kernel with CONFIG_SECCOMP_FILTER")
    missing = [name for name in ("kill_process", "errno", "user_notif") if name not in actions]
    if missing:
        return Finding("seccomp", BAD, f"lacks {', '.join(missing)}", "Linux 5.0 or newer")
    try:
        from jailer.seccomp.install import load

        warning = load(("supervisor", "vmm", "vcpu"), "kill").warning
    except JailerError as error:
        return Finding("seccomp", BAD, str(error), "./dev setup compiles the filters")
    if warning:
        return Finding("seccomp", WORSE, warning, "./dev setup")
    return Finding("seccomp", GOOD, "filters are compiled")


#: The first ABI of Landlock that has something, and what it is.
_LANDLOCK = ((1, "files"), (3, "truncation"), (4, "TCP"), (5, "device requests"), (6, "abstract sockets and signals"))


def check_landlock() -> Finding:
    """Which level of Landlock does the kernel offer, and what do the cells go without?"""
    level = landlock.abi()
    if not level:
        remedy = "a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in its lsm= list (from Linux 6.12 on all of it)"
        return Finding("landlock", WORSE, "none: the other walls alone bound files, sockets and signals", remedy)
    missing = [what for first, what in _LANDLOCK if level < first]
    if missing:
        return Finding("landlock", WORSE, f"ABI {level}: nothing on {', '.join(missing)}", "Linux 6.12 or newer")
    return Finding("landlock", GOOD, f"ABI {level}: {', '.join(what for _, what in _LANDLOCK)}")


def check_cgroups() -> list[Finding]:
    """Which cgroup versions does the host mount, and with which controllers?"""
    try:
        found = cgroups.find_hierarchies()
    except JailerError as error:
        return [Finding("cgroups", BAD, str(error), "mount /proc")]
    findings = []
    if found.v1:
        names = ", ".join(sorted(name for name, path in found.v1.items() if path.endswith(f"/{name}")))
        findings.append(Finding("cgroup v1", GOOD, f"{names} (--cgroup-version 1)"))
    if found.v2:
        controllers = cgroups.read_file(os.path.join(found.v2, "cgroup.controllers"))
        if controllers:
            findings.append(Finding("cgroup v2", GOOD, f"{found.v2}: {controllers} (--cgroup-version 2)"))
        else:
            findings.append(Finding("cgroup v2", WORSE, f"{found.v2} has no controllers", "use --cgroup-version 1"))
    if not findings:
        findings.append(Finding("cgroups", WORSE, "none mounted", "mount cgroup2 at /sys/fs/cgroup to use --cgroup"))
    return findings


def check_limits() -> Finding:
    """Does the hard limit on open files allow the default of --resource-limit?"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < DEFAULT_NO_FILE:
        return Finding("limits", WORSE, f"at most {hard} open files", "raise it, or give --resource-limit no-file=N")
    return Finding("limits", GOOD, f"{'any number of' if hard == resource.RLIM_INFINITY else hard} open files")


def check_jail_base(base: str = "/srv/jailer") -> Finding:
    """Is there a place for jails, on a file system that can hold them?"""
    if not os.path.isdir(base):
        return Finding("jail base", WORSE, f"{base} does not exist", f"mkdir {base}, or give --chroot-base-dir")
    flags = os.statvfs(base).f_flag
    wrong = [name for name, flag in (("ro", os.ST_RDONLY), ("nodev", os.ST_NODEV)) if flags & flag]
    if wrong:
        return Finding("jail base", WORSE, f"{base} is mounted {', '.join(wrong)}", "give another --chroot-base-dir")
    return Finding("jail base", GOOD, base)


def _child_succeeds(attempt: Callable[[], None]) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            attempt()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def run_checks() -> list[Finding]:
    """Carry out every check."""
    return [
        check_kernel(),
        check_privileges(),
        *check_kvm(),
        check_placement(),
        check_namespaces(),
        check_mounts(),
        check_seccomp(),
        check_landlock(),
        *check_cgroups(),
        check_limits(),
        check_jail_base(),
    ]


def report(findings: list[Finding]) -> str:
    """Return the lines that people read."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:>7}  {finding.topic}: {finding.text}")
        if finding.state != GOOD and finding.remedy:
            lines.append(f"{'':>7}  → {finding.remedy}")
    bad = sum(finding.state == BAD for finding in findings)
    lines.append("This host can run jailed microVMs." if not bad else f"{bad} of {len(findings)} checks failed.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the report; 0 if a jailed microVM can be launched here, else 1."""
    findings = run_checks()
    sys.stdout.write(report(findings))
    sys.stdout.flush()
    return int(any(finding.state == BAD for finding in findings))
