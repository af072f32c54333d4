"""Fixtures of the tests with KVM."""

from __future__ import annotations

from tests.harness.ghost_bench import bench

__all__ = ["bench"]
