"""The id of this run of the kernel."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from base import boot_id


def test_it_is_what_the_kernel_says():
    told = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot_id.read_boot_id() == uuid.UUID(told).bytes


@pytest.mark.parametrize("text", [None, "", "what", "00" * 15, "00" * 17, "\xff"])
def test_what_is_none_is_nothing(monkeypatch, tmp_path, text):
    if text is not None:
        (tmp_path / "id").write_text(text)
    monkeypatch.setattr(boot_id, "_PATH", str(tmp_path / "id"))
    assert boot_id.read_boot_id() == b""
