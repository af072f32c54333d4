"""The virtio devices and the cells that serve them: /devices."""

from __future__ import annotations

from base.lean_typing import Any
from vmm.api.endpoints.table import INTERNAL, Endpoint, unknown_path


def _no_id(rest: list[str], _body: Any) -> None:
    if rest:
        raise unknown_path("GET", "devices")


ENDPOINTS = (
    Endpoint(
        "GET", "devices", None, None, lambda session, _id, _body: session.machine.device_report(), INTERNAL,
        check=_no_id,
    ),
)  # fmt: skip
