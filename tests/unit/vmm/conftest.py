"""Fixtures of the controller's tests."""

from __future__ import annotations

import os

import pytest

from tests.unit.vmm.standins import Controller
from vmm.logger import LOG


@pytest.fixture
def log(tmp_path):
    """The log goes to a file: a function that returns its text."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    LOG.use_descriptor(descriptor)
    yield path.read_text
    LOG.close()
    os.close(descriptor)


@pytest.fixture
def make(tmp_path):
    controllers = []

    def make(*behaviours, supervisor=None, context=None) -> Controller:
        controllers.append(Controller(str(tmp_path), *behaviours, supervisor=supervisor, context=context))
        return controllers[-1]

    yield make
    for controller in controllers:
        controller.close()
