"""Fixtures of the tests of vmm.boot."""

from __future__ import annotations

from tests.harness.memory_fixtures import cache, guest_memory, open_file

__all__ = ["cache", "guest_memory", "open_file"]
