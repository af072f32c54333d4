"""Fixtures of the API tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.api import Api
from tests.harness.api_server import Host


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """Path of a file that can be a kernel as far as the API knows."""
    path = tmp_path / "vmlinux"
    path.write_bytes(b"kernel")
    return str(path)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """An API before the start."""
    api = Api(str(tmp_path / "log"))
    yield api
    api.close()


@pytest.fixture
def running(api: Api, kernel: str) -> Api:
    """An API with a microVM that was started."""
    assert api.send("PUT", "/boot-source", {"kernel_image_path": kernel}) == (204, None)
    assert api.send("PUT", "/actions", {"action_type": "InstanceStart"}) == (204, None)
    return api


@pytest.fixture
def host(api: Api, tmp_path: Path) -> Iterator[Host]:
    """A server of this API, whose socket is served when the test says so."""
    host = Host(str(tmp_path / "api.socket"), api.dispatcher, api.logger)
    yield host
    host.close()
