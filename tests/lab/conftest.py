"""Fixtures of the tests in the lab."""

from __future__ import annotations

from tests.harness.ghost_bench import bench

__all__ = ["bench"]
