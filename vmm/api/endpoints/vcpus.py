"""The vCPUs and the workers that run them: /vcpus and /vcpus/{index}."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.api.endpoints.table import INTERNAL, Endpoint, RequestError, unknown_path
from vmm.json.schema import Field, Object, Variant

if TYPE_CHECKING:
    from vmm.session import Session

_REPLACE_ERROR = "Replace worker error"

VCPU_ACTION = Object("VcpuAction", str, Field("action", Variant("Replace")))


def _no_index(rest: list[str], _body: Any) -> None:
    if rest:
        raise unknown_path("GET", "vcpus")


def _check_index(rest: list[str], _body: Any) -> None:
    number = rest[0]
    if len(rest) > 1 or not (number.isascii() and number.isdigit()) or len(number) > 4:
        raise RequestError(f"Invalid vCPU index: {number[:64]!r}.")


def _replace(session: Session, index: str, _body: Any) -> None:
    session.machine.replace_vcpu(int(index))


ENDPOINTS = (
    Endpoint(
        "GET", "vcpus", None, None, lambda session, _id, _body: session.machine.vcpu_report(), INTERNAL,
        check=_no_index,
    ),
    Endpoint(
        "PATCH", "vcpus", VCPU_ACTION, None, lambda session, _id, _body: session.machine.replace_vcpus(),
        _REPLACE_ERROR,
    ),
    Endpoint("PATCH", "vcpus/{index}", VCPU_ACTION, None, _replace, _REPLACE_ERROR, check=_check_index),
)  # fmt: skip
