"""Fixtures of the jail tests."""

from __future__ import annotations

from tests.harness.jail_fixtures import base

__all__ = ["base"]
