"""What the other lab tests rely on. Runs inside."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.run_options import IN_LAB

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41

only_in_the_emulated_machine = pytest.mark.skipif(not IN_LAB, reason="this host has hardware paging of its own")


def test_kvm_pages_in_hardware_and_runs():
    parameters = [Path("/sys/module/kvm_amd/parameters/npt"), Path("/sys/module/kvm_intel/parameters/ept")]
    assert any(path.exists() and path.read_text().strip() in {"1", "Y"} for path in parameters)
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    assert fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) == 12
    for descriptor in (vcpu, vm, kvm):
        os.close(descriptor)


@only_in_the_emulated_machine
def test_nothing_of_ours_runs_on_the_first_processor():
    """docs/lab.md, "Why no guest runs on the first processor": no process but the kernel's own."""
    allowed = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes():
                allowed[process.name] = os.sched_getaffinity(int(process.name))
        except OSError:
            continue  # it has ended
    assert {"1", str(os.getpid())} <= allowed.keys()
    others = set(range(1, os.cpu_count() or 0))
    assert others and all(cpus <= others for cpus in allowed.values()), allowed


@only_in_the_emulated_machine
def test_cgroups_are_version_2_only():
    mounted = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    assert [fields[1] for fields in mounted if fields[2].startswith("cgroup")] == ["/sys/fs/cgroup"]
    assert "cgroup" not in {fields[2] for fields in mounted}
    controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert {"cpuset", "cpu", "io", "memory", "pids"} <= set(controllers)


@only_in_the_emulated_machine
def test_every_capability_is_there():
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == (1 << (last + 1)) - 1
    assert status["Seccomp"].strip() == "0"


@only_in_the_emulated_machine
def test_writes_to_the_root_stay_here_and_work():
    Path("/etc/cellblock-test").write_text("x")
    assert Path("/etc/cellblock-test").read_text() == "x"
    Path("/etc/cellblock-test").unlink()
    for place in ("/tmp", "/run", "/dev/shm", "/srv/jailer", "/var/tmp"):
        assert subprocess.check_output(["stat", "-f", "-c", "%T", place], text=True) == "tmpfs\n"


@only_in_the_emulated_machine
def test_modules_can_be_loaded():
    subprocess.run(["modprobe", "veth"], check=True)
    assert Path("/sys/module/veth").is_dir()
    assert Path("/dev/net/tun").exists()


@only_in_the_emulated_machine
def test_jails_can_be_made(tmp_path):
    """Namespaces and pivot_root, also for who is not root: not given under every initramfs."""
    jail = Path("/srv/jailer/test-pivot")
    jail.mkdir()
    script = f"mount --bind {jail} {jail} && cd {jail} && mkdir old && pivot_root . old && echo pivoted"
    assert subprocess.check_output(["unshare", "-m", "sh", "-c", script], text=True) == "pivoted\n"
    as_nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    subprocess.run([*as_nobody, "unshare", "-Ur", "true"], check=True)


@only_in_the_emulated_machine
def test_host_files_and_the_exchange_folder():
    assert Path("/proc/sys/kernel/hostname").read_text() == "cellblock-lab\n"
    assert (Path(os.environ["LAB_EXCHANGE"]) / ".lab").is_dir()
    assert subprocess.run(["ip", "-o", "link", "show", "up", "dev", "lo"], check=False).returncode == 0
