"""Fixtures of the controller's tests."""

from __future__ import annotations

import pytest

from tests.harness.api_fixtures import api, host, kernel, running
from tests.harness.cells import Controller

__all__ = ["api", "host", "kernel", "running"]


@pytest.fixture
def make(tmp_path):
    controllers = []

    def make(*behaviours, supervisor=None, context=None) -> Controller:
        controllers.append(Controller(str(tmp_path), *behaviours, supervisor=supervisor, context=context))
        return controllers[-1]

    yield make
    for controller in controllers:
        controller.close()
