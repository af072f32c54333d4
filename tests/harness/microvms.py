"""Helpers of the full-stack tests: real `firecracker` and `jailer` processes, real KVM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lab.client import Microvm, launch_unjailed
from tests.harness.jail import children, descriptors, wait_for

_COUNTS = re.compile(r"Exerciser: (\d+) counts, (\d+) errors, guest says (\d+)")


def write_config(
    directory: Path,
    kernel: Path | str,
    *,
    boot_args: str = "",
    initrd: Path | str | None = None,
    mem_size_mib: int = 128,
    **more: Any,
) -> Path:
    """Write a configuration file; return its path."""
    config: dict[str, Any] = {
        "boot-source": {"kernel_image_path": str(kernel), "boot_args": boot_args},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mem_size_mib},
        **more,
    }
    if initrd is not None:
        config["boot-source"]["initrd_path"] = str(initrd)
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


def launch_config(
    directory: Path, kernel: Path | str, *arguments: str, boot_args: str = "", api: bool = False
) -> Microvm:
    """Start an un-jailed microVM from a configuration file."""
    config = write_config(directory, kernel, boot_args=boot_args)
    flags = ["--config-file", str(config), *arguments]
    return launch_unjailed(directory, flags if api else [*flags, "--no-api"])


def exerciser_counts(output: str) -> tuple[int, int, int]:
    """Return (counts, errors, errors that the guest saw) from the log."""
    found = _COUNTS.search(output)
    assert found is not None, f"the exerciser did not report:\n{output}"
    counts, errors, guest = map(int, found.groups())
    return counts, errors, guest


def smp_config(directory: Path, kernel: Path, vcpus: int, placement: str) -> Path:
    """Write a configuration file for a bare-metal guest with several vCPUs; return its path."""
    machine = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
    path = directory / "config.json"
    path.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(kernel)}, "drives": [], "machine-config": machine})
    )
    return path


def wait_for_first_worker(vm: Microvm, seconds: float = 300.0) -> None:
    """Wait until the controller has all that its first worker brings along, its descriptors above all.

    That is so when it has welcomed it: then the path of the worker's endpoint is gone.
    """

    def welcomed() -> bool:
        controller = children(vm.process.pid).get("vmm")
        path = None if controller is None else _endpoint(controller)
        return path is not None and not path.exists()

    wait_for(welcomed, "the first worker", seconds)


def _endpoint(controller: int) -> Path | None:
    """Return the path that the endpoint of the first worker was bound to; None if it was not."""
    inodes = {target[8:-1] for target in descriptors(controller).values() if target.startswith("socket:[")}
    for line in Path(f"/proc/{controller}/net/unix").read_text().splitlines()[1:]:
        _, _, _, _, _, _, inode, *path = line.split()
        if inode in inodes and path and path[0].endswith("/vcpu-0"):
            return Path(path[0])
    return None
