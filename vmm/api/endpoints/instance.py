"""The microVM as a whole: /, /version, /vm/config, /vm and /actions."""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING, Any
from base.version import FIRECRACKER_VERSION
from vmm.api.endpoints.table import INTERNAL, Endpoint
from vmm.json.schema import Field, Object, Variant
from vmm.session import START_ERROR

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.json.text import JsonValue
    from vmm.session import Session

FLUSH_METRICS = "FlushMetrics"
INSTANCE_START = "InstanceStart"
SEND_CTRL_ALT_DEL = "SendCtrlAltDel"
PAUSED = "Paused"
RESUMED = "Resumed"

#: Both become the only value that they hold.
ACTION = Object("ActionBody", str, Field("action_type", Variant(FLUSH_METRICS, INSTANCE_START, SEND_CTRL_ALT_DEL)))
VM_STATE = Object("Vm", str, Field("state", Variant(PAUSED, RESUMED)))


def _info(session: Session, _id: str, _body: Any) -> JsonValue:
    return session.instance_info()._asdict()


def _full_config(session: Session, _id: str, _body: Any) -> JsonValue:
    return session.resources.to_json()


def _flush_metrics(session: Session, _id: str, _body: Any) -> None:
    session.metrics.flush()


def _pause(session: Session, _id: str, _body: Any) -> None:
    _measured(session, "pause_vm", session.machine.pause_vm)


def _resume(session: Session, _id: str, _body: Any) -> None:
    _measured(session, "resume_vm", session.machine.resume_vm)


def _measured(session: Session, name: str, operation: Callable[[], None]) -> None:
    start = time.monotonic_ns()
    operation()
    elapsed_us = (time.monotonic_ns() - start) // 1000
    session.metrics["latencies_us"].store(f"vmm_{name}", elapsed_us)
    session.logger.info(f"'{name.replace('_', ' ')}' VMM action took {elapsed_us} us.")


ENDPOINTS = (
    Endpoint("GET", "", None, _info, _info, counted="instance_info"),
    Endpoint(
        "GET", "version", None,
        lambda _session, _id, _body: {"firecracker_version": FIRECRACKER_VERSION},
        lambda session, _id, _body: {"firecracker_version": session.machine.version()},
        counted="vmm_version",
    ),
    Endpoint("GET", "vm/config", None, _full_config, _full_config),
    Endpoint("PATCH", "vm", VM_STATE, None, _pause, INTERNAL, choice=PAUSED, timed="pause_vm"),
    Endpoint("PATCH", "vm", VM_STATE, None, _resume, INTERNAL, choice=RESUMED, timed="resume_vm"),
    Endpoint(
        "PUT", "actions", ACTION, lambda session, _id, _body: session.start(), None, START_ERROR,
        counted="actions", choice=INSTANCE_START,
    ),
    Endpoint(
        "PUT", "actions", ACTION, None, _flush_metrics,
        f"{INTERNAL}: Metrics error", counted="actions", choice=FLUSH_METRICS,
    ),
    Endpoint(
        "PUT", "actions", ACTION, None, lambda session, _id, _body: session.machine.send_ctrl_alt_del(), INTERNAL,
        counted="actions", choice=SEND_CTRL_ALT_DEL,
    ),
)  # fmt: skip
