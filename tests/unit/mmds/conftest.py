"""Fixtures of the metadata service's tests."""

from __future__ import annotations

from tests.unit.api.conftest import api

__all__ = ["api"]
