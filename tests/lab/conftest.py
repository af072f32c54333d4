"""Fixtures of the tests in the lab."""

from __future__ import annotations

from tests.harness.ghost_bench import bench
from tests.harness.jail_fixtures import base

__all__ = ["base", "bench"]
