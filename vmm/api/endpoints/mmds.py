"""The metadata service: /mmds and /mmds/config."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.api.endpoints.table import Endpoint, OperationError, unrecognized
from vmm.config.mmds import MMDS_CONFIG
from vmm.json.schema import ANYTHING
from vmm.mmds.store import V1, MmdsLimitError, NotInitializedError

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.config.mmds import MmdsConfig
    from vmm.json.text import JsonValue
    from vmm.session import Session

_ERROR = "MMDS error"


def _get(session: Session, _id: str, _body: Any) -> JsonValue:
    return session.resources.mmds.value


def _put(session: Session, _id: str, value: JsonValue) -> None:
    _limited(session.resources.mmds.put, value)


def _patch(session: Session, _id: str, value: JsonValue) -> None:
    _limited(session.resources.mmds.patch, value)


def _put_running(session: Session, _id: str, value: JsonValue) -> None:
    _require_interface(session)
    _put(session, "", value)


def _patch_running(session: Session, _id: str, value: JsonValue) -> None:
    _require_interface(session)
    _patch(session, "", value)


def _require_interface(session: Session) -> None:
    """After the start only a network interface leads to the data store: without one in /mmds/config there is none."""
    if session.resources.mmds_config is None:
        raise NotInitializedError


def _limited(operation: Callable[[JsonValue], None], value: JsonValue) -> None:
    try:
        operation(value)
    except MmdsLimitError as error:
        raise OperationError(f"MMDS limit exceeded error: {error}", 413) from error


def _deprecation(config: MmdsConfig) -> str | None:
    return "PUT /mmds/config: V1 is deprecated. Use V2 instead." if config.version == V1 else None


#: Method and resource → what is said of a path that no row has.
UNKNOWN_PATHS = {("PUT", "mmds"): lambda rest: unrecognized("PUT", rest[0])}

ENDPOINTS = (
    Endpoint("GET", "mmds", None, _get, _get, counted="mmds"),
    Endpoint("PUT", "mmds", ANYTHING, _put, _put_running, _ERROR, counted="mmds"),
    Endpoint("PATCH", "mmds", ANYTHING, _patch, _patch_running, _ERROR, counted="mmds"),
    Endpoint(
        "PUT", "mmds/config", MMDS_CONFIG, lambda session, _id, config: session.resources.set_mmds_config(config),
        None, "MMMDS config error", counted="mmds", boot_specific=True, deprecation=_deprecation,
        section="mmds-config",
    ),
)  # fmt: skip
