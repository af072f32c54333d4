"""Reading and writing templates and fingerprints (docs/formats/cpu-template.md)."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from base.errno_text import errno_text
from cellblock.cpu_template.errors import ToolError
from vmm.cpu_config.template import CPU_TEMPLATE, CustomCpuTemplate
from vmm.json.decoder import JsonError
from vmm.json.schema import decode

#: A file may not be larger than this.
MAX_SIZE = 1 << 20


def read(path: Path, what: str) -> bytes:
    """Return the content of a file. Raises ToolError."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ToolError(f"{what} {path} cannot be read: not a regular file")
            text = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ToolError(f"{what} {path} cannot be read: {errno_text(error)}") from error
    if len(text) > MAX_SIZE:
        raise ToolError(f"{what} {path} cannot be read: the file is larger than {MAX_SIZE} bytes")
    return text


def _without_waiting(path: str, flags: int) -> int:
    """A FIFO that nobody writes to is refused, not waited for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def parse_template(text: bytes, name: str) -> CustomCpuTemplate:
    """Return the template that a text describes; ``name`` says where it comes from. Raises ToolError."""
    try:
        template: CustomCpuTemplate = decode(CPU_TEMPLATE, text)
    except JsonError as error:
        raise ToolError(f"{name} is not a CPU template: {error}") from error
    return template


def read_template(path: Path) -> CustomCpuTemplate:
    """Return the template in a file. Raises ToolError."""
    return parse_template(read(path, "The CPU template"), str(path))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, indented. Raises ToolError."""
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ToolError(f"{path} cannot be written: {error.strerror}") from error


def write_template(path: Path, template: CustomCpuTemplate) -> None:
    """Write a template. Raises ToolError."""
    write_json(path, template.to_json())
