"""Devices that change how much memory the guest has: /balloon and /hotplug/memory."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.api.endpoints.table import INTERNAL, Endpoint, OperationError, RequestError, unrecognized
from vmm.config.balloon import BALLOON, BALLOON_STATS_UPDATE, BALLOON_UPDATE, START_HINTING, BalloonError
from vmm.config.memory_hotplug import MEMORY_HOTPLUG, MEMORY_HOTPLUG_UPDATE

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.json.text import JsonValue
    from vmm.session import Session

_CONFIG_ERROR = "Balloon config error"
_UPDATE_ERROR = "Balloon update error"


def _configured_balloon(session: Session, _id: str, _body: Any) -> JsonValue:
    try:
        return session.resources.require_balloon().to_json()
    except BalloonError as error:
        raise OperationError(f"{_CONFIG_ERROR}: {error}") from error


def _unknown_balloon_path(method: str) -> Callable[[list[str]], RequestError]:
    return lambda rest: unrecognized(method, rest[1] if rest[0] == "hinting" and len(rest) > 1 else rest[0])


#: Method and resource → what is said of a path that no row has.
UNKNOWN_PATHS = {(method, "balloon"): _unknown_balloon_path(method) for method in ("GET", "PATCH")}

ENDPOINTS = (
    Endpoint(
        "PUT", "balloon", BALLOON, lambda session, _id, config: session.resources.set_balloon(config), None,
        _CONFIG_ERROR, boot_specific=True, section="balloon",
    ),
    Endpoint(
        "GET", "balloon", None, _configured_balloon, lambda session, _id, _body: session.machine.balloon_config(),
        INTERNAL,
    ),
    Endpoint(
        "PATCH", "balloon", BALLOON_UPDATE, None,
        lambda session, _id, amount_mib: session.machine.update_balloon_config(amount_mib), _UPDATE_ERROR,
    ),
    Endpoint(
        "GET", "balloon/statistics", None, None,
        lambda session, _id, _body: session.machine.latest_balloon_stats(), INTERNAL,
    ),
    Endpoint(
        "PATCH", "balloon/statistics", BALLOON_STATS_UPDATE, None,
        lambda session, _id, interval_s: session.machine.update_balloon_stats_config(interval_s), _UPDATE_ERROR,
    ),
    Endpoint(
        "GET", "balloon/hinting/status", None, None,
        lambda session, _id, _body: session.machine.get_balloon_hinting_status(), _UPDATE_ERROR,
    ),
    Endpoint(
        "PATCH", "balloon/hinting/start", START_HINTING, None,
        lambda session, _id, acknowledge: session.machine.start_balloon_hinting(acknowledge), _UPDATE_ERROR,
        default=True,
    ),
    Endpoint(
        "PATCH", "balloon/hinting/stop", None, None,
        lambda session, _id, _body: session.machine.stop_balloon_hinting(), _UPDATE_ERROR,
    ),
    Endpoint(
        "PUT", "hotplug/memory", MEMORY_HOTPLUG,
        lambda session, _id, config: session.resources.set_memory_hotplug(config), None,
        "Memory hotplug config error", counted="hotplug_memory", boot_specific=True, section="memory-hotplug",
    ),
    Endpoint(
        "GET", "hotplug/memory", None, None, lambda session, _id, _body: session.machine.memory_hotplug_status(),
        INTERNAL, counted="hotplug_memory",
    ),
    Endpoint(
        "PATCH", "hotplug/memory", MEMORY_HOTPLUG_UPDATE, None,
        lambda session, _id, size_mib: session.machine.update_memory_hotplug_size(size_mib),
        "Memory hotplug update error", counted="hotplug_memory",
    ),
)  # fmt: skip
