"""Must-show 2 and 3: an unmodified Debian kernel boots in a jailed microVM, entered in every way, small and large."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lab.client import ClientError, Jail, Microvm, without_log
from tests.harness.debian import BASE_ARGS, BOOT_TIMEOUT, CGROUP_OPTIONS, boot_args, jail


def write_config(made: Jail, kernel: str, initramfs: str, args: str, mem_size_mib: int) -> str:
    config: dict[str, Any] = {
        "boot-source": {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": args},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mem_size_mib},
    }
    return made.write(json.dumps(config), "config.json")


def memory_of(output: str) -> int:
    """Return the guest's MemTotal in MiB."""
    found = re.search(r"MemTotal:\s+(\d+) kB", output)
    assert found, output
    return int(found.group(1)) // 1024


KERNELS = {
    "bzimage-unpacked-on-the-host": ("vmlinuz", (), "Linux 64-bit boot protocol (bzImage)"),
    "bzimage-as-is": ("vmlinuz", ("--unpack-kernel", "off"), "Linux 64-bit boot protocol (bzImage)"),
    "vmlinux-pvh": ("vmlinux", ("--kernel-entry", "pvh"), "PVH boot protocol"),
    "vmlinux-64-bit": ("vmlinux", ("--kernel-entry", "linux64"), "Linux 64-bit boot protocol"),
}


@pytest.mark.parametrize("entered", KERNELS)
@pytest.mark.parametrize("mem_size_mib", [128, 4096])
def test_debian_boots_from_a_config_file(guest_image, no_leftovers, entered, mem_size_mib):
    image, arguments, words = KERNELS[entered]
    name = f"boot-{image}-{mem_size_mib}"
    with jail(name) as made, no_leftovers(names=(name,)):
        kernel = made.add(getattr(guest_image, image), image)
        initramfs = made.add(guest_image.initramfs, "initramfs")
        config = write_config(made, kernel, initramfs, boot_args("grep MemTotal /proc/meminfo; uname -r"), mem_size_mib)
        options = (*CGROUP_OPTIONS, "--cleanup")
        with made.launch(options, ("--config-file", config, "--no-api", *arguments)) as vm:
            output = vm.expect("CELLBLOCK-DONE", BOOT_TIMEOUT)
            assert vm.wait(60.0) == 0, vm.tail()
    assert f"Kernel loaded using {words}" in output
    output = without_log(output)
    assert "CELLBLOCK-RUN end status=0" in output
    assert mem_size_mib * 0.7 < memory_of(output) <= mem_size_mib


def test_debian_boots_by_curl_alone(guest_image, no_leftovers):
    """Must-show 3: nothing but `curl --unix-socket`; pause, resume, Ctrl-Alt-Del are there too."""
    with jail("curl") as made, no_leftovers(names=("curl",)):
        kernel = made.add(guest_image.vmlinuz, "vmlinuz")
        initramfs = made.add(guest_image.initramfs, "initramfs")
        with made.launch((*CGROUP_OPTIONS, "--cleanup")) as vm:
            vm.wait_for_api()
            curl(vm, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 256})
            source = {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": boot_args(end="stay")}
            curl(vm, "PUT", "/boot-source", source)
            curl(vm, "PUT", "/actions", {"action_type": "InstanceStart"})
            vm.expect("CELLBLOCK-READY", BOOT_TIMEOUT)
            first = uptime(vm)
            curl(vm, "PATCH", "/vm", {"state": "Paused"})
            assert curl(vm, "GET", "/")["state"] == "Paused"
            vm.type("echo asleep\n")
            pause_ends = time.monotonic() + 2.0
            while time.monotonic() < pause_ends:
                vm.pump(0.1)
            assert "\nasleep" not in without_log(vm.console)
            curl(vm, "PATCH", "/vm", {"state": "Resumed"})
            vm.expect("CELLBLOCK-RUN end", 60.0)
            assert uptime(vm) > first
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0


def curl(vm: Microvm, method: str, target: str, body: Any = None) -> Any:
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail-with-body",
        "--unix-socket",
        str(vm.api_socket),
        "-X",
        method,
    ]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(
        [*command, f"http://localhost{target}"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, f"{method} {target}: {done.stdout} {done.stderr}\n{vm.tail()}"
    return json.loads(done.stdout) if done.stdout else None


def uptime(vm: Microvm) -> float:
    vm.type("cat /proc/uptime\n")
    output = without_log(vm.expect("CELLBLOCK-RUN end", 60.0))
    found = re.search(r"^(\d+\.\d+) \d+\.\d+", output, re.MULTILINE)
    assert found, output
    return float(found.group(1))


def test_a_corrupt_kernel_leaves_the_controller_configurable(guest_image, no_leftovers):
    """A start that fails is one clear error; the same controller then boots with the right kernel."""
    with jail("retry") as made, no_leftovers(names=("retry",)):
        broken = bytearray(Path(guest_image.vmlinuz).read_bytes())
        broken[len(broken) // 2 : len(broken) // 2 + 4096] = os.urandom(4096)
        target = made.root / "broken"
        target.write_bytes(broken)
        os.chown(target, made.uid, made.gid)
        kernel = made.add(guest_image.vmlinuz, "vmlinuz")
        initramfs = made.add(guest_image.initramfs, "initramfs")
        with made.launch((*CGROUP_OPTIONS, "--cleanup")) as vm:
            vm.wait_for_api()
            vm.must("PUT", "/boot-source", {"kernel_image_path": "/broken", "boot_args": BASE_ARGS})
            reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
            assert reply.status == 400
            assert reply.body["fault_message"].startswith("Start microvm error: ")
            assert vm.must("GET", "/")["state"] == "Not started"
            source = {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": boot_args()}
            vm.must("PUT", "/boot-source", source)
            vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
            vm.expect("CELLBLOCK-DONE", BOOT_TIMEOUT)
            assert vm.wait(60.0) == 0


def test_client_errors_are_readable():
    """The harness itself: what went wrong is in the exception, with the console's tail."""
    with (
        jail("early") as made,
        made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", "/missing", "--no-api")) as vm,
    ):
        with pytest.raises(ClientError, match="ended before"):
            vm.expect("CELLBLOCK-DONE", 60.0)
        assert vm.wait() == 1
