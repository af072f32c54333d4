"""What a guest would get of its CPU: asked of a microVM that ``firecracker`` builds and never runs.

The same code builds it as for any other microVM: a worker on /dev/kvm takes the configuration and reports what came
of it. Of a configuration file the machine and the template count; kernel and devices do not matter to a CPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from struct import Struct
from typing import Any

from cellblock.cpu_template import files
from cellblock.cpu_template.errors import ToolError
from vmm.config import file as config_file
from vmm.cpu_config.static_templates import PERMITTED, static_template
from vmm.cpu_config.template import CustomCpuTemplate
from vmm.json.text import JsonValue

#: A microVM is built in a tenth of a second; emulated machines take a hundred times as long.
TIMEOUT_S = 120
_EXIT_CODES_WITH_REASON = "Could not Start MicroVM from one single json: "

# ELF header and one program header of an executable for x86-64 (System V ABI).
_ELF_HEADER = Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = Struct("<IIQQQQQQ")
_LOAD_ADDRESS = 0x10_0000
_HLT = b"\xf4"


class Target:
    """A microVM to ask: what ``-c`` and ``-t`` describe. Raises ToolError."""

    def __init__(self, config: Path | None, template: Path | None) -> None:
        #: What the configuration says of the machine.
        self.machine: dict[str, JsonValue] = {}
        self.template: CustomCpuTemplate | None = None
        self.static_name: str | None = None
        if config is not None:
            self._read_config(config)
        if template is not None:
            self.template, self.static_name = files.read_template(template), None

    def _read_config(self, path: Path) -> None:
        try:
            document = config_file.parse(files.read(path, "The configuration file"))
        except config_file.ConfigFileError as error:
            raise ToolError(str(error)) from error
        machine = document.sections.get("machine-config")
        if machine is not None:
            self.machine = {key: value for key, value in machine._asdict().items() if value is not None}
        self.template = document.sections.get("cpu-config")
        name = self.machine.get("cpu_template")
        if self.template is None and isinstance(name, str) and name in PERMITTED:
            self.static_name = name

    def required_template(self) -> CustomCpuTemplate:
        """Return the template. Raises ToolError if there is none."""
        if self.template is not None:
            return self.template
        if self.static_name is not None:
            return static_template(self.static_name)
        raise ToolError("no CPU template: give one with --template, or a --config that has one")

    def document(self, kernel: Path) -> dict[str, Any]:
        """Return the configuration of the microVM that is built."""
        machine = {"vcpu_count": 1, "mem_size_mib": 128, **self.machine, "cpu_template": self.static_name}
        document: dict[str, Any] = {
            "boot-source": {"kernel_image_path": str(kernel)},
            "drives": [],
            "machine-config": machine,
        }
        if self.template is not None:
            document["cpu-config"] = self.template.to_json()
        return document


def cpu_config(target: Target) -> CustomCpuTemplate:
    """Return CPUID and MSRs of the first vCPU as a template that sets every bit. Raises ToolError."""
    with tempfile.TemporaryDirectory(prefix="cpu-template-") as name:
        directory = Path(name)
        kernel, config, output = (directory / part for part in ("kernel", "config.json", "cpu.json"))
        kernel.write_bytes(_kernel())
        config.write_text(json.dumps(target.document(kernel)))
        command = [firecracker(), "--id", "cpu-template", "--no-api", "--config-file", config]
        command += ["--dump-cpu-config", output]
        _run([*map(str, command)])
        return files.parse_template(files.read(output, "The CPU configuration"), "the CPU configuration")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise ToolError(f"{command[0]} did not end within {TIMEOUT_S} s") from None
    if done.returncode == 0:
        return
    lines = (done.stdout + done.stderr).splitlines()
    for line in lines:
        _, found, reason = line.partition(_EXIT_CODES_WITH_REASON)
        if found:
            raise ToolError(f"the microVM cannot be built: {reason}")
    tail = "\n".join(lines[-10:])
    raise ToolError(f"the microVM cannot be built: {command[0]} ended with status {done.returncode}\n{tail}")


def firecracker() -> Path:
    """Return the launcher that lies beside ours. Raises ToolError."""
    beside = Path(sys.argv[0]).resolve().parent / "firecracker"
    if beside.is_file():
        return beside
    found = shutil.which("firecracker")
    if found is None:
        raise ToolError("the program firecracker is neither beside this one nor on PATH")
    return Path(found)


def _kernel() -> bytes:
    """Return the smallest kernel that can be loaded; it never runs."""
    offset = _ELF_HEADER.size + _PROGRAM_HEADER.size
    identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = _ELF_HEADER.pack(
        identification, 2, 62, 1, _LOAD_ADDRESS + offset, _ELF_HEADER.size, 0, 0, 64, _PROGRAM_HEADER.size, 1, 0, 0, 0
    )
    size = offset + len(_HLT)
    return header + _PROGRAM_HEADER.pack(1, 5, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 4096) + _HLT
