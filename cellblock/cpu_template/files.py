"""Reading and writing templates and fingerprints (docs/formats/cpu-template.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cellblock.cpu_template.errors import ToolError
from vmm.cpu_config.template import CPU_TEMPLATE, CustomCpuTemplate
from vmm.files import FileOpenError, read_text
from vmm.json.decoder import JsonError
from vmm.json.schema import decode

#: A file may not be larger than this.
MAX_SIZE = 1 << 20


def read(path: Path, what: str) -> bytes:
    """Return the content of a file. Raises ToolError."""
    try:
        return read_text(str(path), MAX_SIZE)
    except FileOpenError as error:
        raise ToolError(f"{what} {path} cannot be read: {error}") from error


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
