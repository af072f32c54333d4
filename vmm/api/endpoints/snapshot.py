"""Snapshots: /snapshot/create and /snapshot/load."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.api.endpoints.table import BAD_JSON, Endpoint, RequestError, unknown_path
from vmm.config.snapshot import CREATE_SNAPSHOT, LOAD_SNAPSHOT
from vmm.errors import StateError
from vmm.machine.vmm import STATE_PAUSED

if TYPE_CHECKING:
    from vmm.config.snapshot import LoadSnapshotParams
    from vmm.session import Session

_NOT_YET = "Snapshots are not yet supported."


def _create(session: Session, _id: str, _body: Any) -> None:
    if session.machine.instance_info.state != STATE_PAUSED:
        raise StateError("Operation not allowed: save/restore unavailable while running")
    raise StateError(_NOT_YET)


def _load(session: Session, _id: str, _body: Any) -> None:
    if session.boot_specific:
        raise StateError("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
    raise StateError(_NOT_YET)


def _one_backend(_rest: list[str], params: LoadSnapshotParams) -> None:
    if params.mem_backend is not None and params.mem_file_path is not None:
        raise RequestError(
            f"{BAD_JSON}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
        )
    if params.mem_backend is None and params.mem_file_path is None:
        raise RequestError(f"{BAD_JSON}missing field: either `mem_backend` or `mem_file_path` is required.")


def _deprecation(params: LoadSnapshotParams) -> str | None:
    used = {"mem_file_path": params.mem_file_path is not None, "enable_diff_snapshots": params.enable_diff_snapshots}
    fields = [name for name in used if used[name]]
    if not fields:
        return None
    verb = "field is" if len(fields) == 1 else "fields are"
    return f"PUT /snapshot/load: {' and '.join(fields)} {verb} deprecated."


def _unknown(rest: list[str]) -> RequestError:
    return unknown_path("PUT", f"/snapshot/{rest[0]}") if rest else RequestError("Missing snapshot operation type.")


#: Method and resource → what is said of a path that no row has.
UNKNOWN_PATHS = {("PUT", "snapshot"): _unknown}

ENDPOINTS = (
    Endpoint("PUT", "snapshot/create", CREATE_SNAPSHOT, None, _create, "Create snapshot error"),
    Endpoint(
        "PUT", "snapshot/load", LOAD_SNAPSHOT, _load, None, "Load snapshot error", check=_one_backend,
        deprecation=_deprecation,
    ),
)  # fmt: skip
