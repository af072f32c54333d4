"""A host's fingerprint: what decides how a guest's CPU looks, to be compared when the host changes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from base.version import FIRECRACKER_VERSION
from cellblock.cpu_template import files
from cellblock.cpu_template.errors import DifferenceError, ToolError
from cellblock.cpu_template.patterns import strip
from vmm.cpu_config.template import CustomCpuTemplate

_MICROCODE = Path("/sys/devices/system/cpu/cpu0/microcode/version")
_CPUINFO = Path("/proc/cpuinfo")
_DMI = Path("/sys/devices/virtual/dmi/id")


class Fingerprint(NamedTuple):
    """The file's fields. None: this host does not say."""

    firecracker_version: str
    kernel_version: str
    microcode_version: str | None
    bios_version: str | None
    bios_revision: str | None
    guest_cpu_config: CustomCpuTemplate

    def to_json(self) -> dict[str, Any]:
        """Return what is written."""
        return {**self._asdict(), "guest_cpu_config": self.guest_cpu_config.to_json()}


#: As ``--filters`` names them.
FILTERS = tuple(name.replace("_", "-") for name in Fingerprint._fields)


def take(config: CustomCpuTemplate) -> Fingerprint:
    """Return the fingerprint of this host, with the guest's CPU configuration on it."""
    return Fingerprint(
        FIRECRACKER_VERSION,
        platform.release(),
        _line(_MICROCODE) or _cpuinfo("microcode"),
        _line(_DMI / "bios_version"),
        _line(_DMI / "bios_release"),
        config,
    )


def read(path: Path) -> Fingerprint:
    """Return the fingerprint in a file. Raises ToolError."""
    text = files.read(path, "The fingerprint")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ToolError(f"{path} is not a fingerprint: {error}") from error
    if not isinstance(document, dict) or set(document) != set(Fingerprint._fields):
        raise ToolError(f"{path} is not a fingerprint: its fields are to be {', '.join(Fingerprint._fields)}")
    for name, value in document.items():
        if name != "guest_cpu_config" and not isinstance(value, str | None):
            raise ToolError(f"{path} is not a fingerprint: {name} is no string")
    config = json.dumps(document.pop("guest_cpu_config")).encode()
    return Fingerprint(**document, guest_cpu_config=files.parse_template(config, f"guest_cpu_config of {path}"))


def compare(before: Fingerprint, now: Fingerprint, filters: Iterable[str] = FILTERS) -> None:
    """Raise DifferenceError if a field of ``filters`` differs."""
    lines = []
    for name in filters:
        field = name.replace("-", "_")
        values = [getattr(before, field), getattr(now, field)]
        if field == "guest_cpu_config":
            values = [template.to_json() for template in strip(values)]
        if values[0] != values[1]:
            lines.append(json.dumps({"name": field, "prev": values[0], "curr": values[1]}, indent=2))
    if lines:
        raise DifferenceError("The fingerprints differ:", lines)


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _cpuinfo(key: str) -> str | None:
    return _find(_CPUINFO.read_text().splitlines(), key)


def _find(lines: Sequence[str], key: str) -> str | None:
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
