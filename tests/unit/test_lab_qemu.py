"""The lab's QEMU: from the cache, else from Debian's backports, else the installed one."""

from __future__ import annotations

import pytest

from lab import debian, qemu


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for module in (qemu, debian):
        monkeypatch.setattr(module, "cache_directory", lambda: tmp_path)
    return tmp_path / "qemu"


def test_what_is_in_the_cache_is_used(cache, monkeypatch):
    monkeypatch.setattr(qemu, "_fetch", lambda releases: pytest.fail("there is one"))
    (cache / ".new-half").mkdir(parents=True)
    (cache / "qemu-system-x86_1").mkdir()
    command = qemu.ensure()
    assert command[0] == str(cache / "qemu-system-x86_1/usr/bin/qemu-system-x86_64")
    assert command[1::2] == ["-L"] * 3


def test_without_backports_it_is_the_installed_one(cache, monkeypatch, capfd):
    """apt itself, with a mirror at which nobody listens."""
    monkeypatch.setattr(qemu, "_mirror", lambda: "http://127.0.0.1:9/debian")
    assert qemu.ensure() == ["qemu-system-x86_64"]
    assert "Is a Debian mirror with bookworm-backports reachable? The lab runs in the installed QEMU" in (
        "".join(capfd.readouterr())
    )
    assert list(cache.iterdir()) == []
