"""Network interfaces: /network-interfaces/{iface_id}."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.api.endpoints.table import Endpoint, RequestError, refuse_hotplug
from vmm.config.network import NETWORK, NETWORK_UPDATE
from vmm.config.rate_limiter import RateLimiterConfig

if TYPE_CHECKING:
    from vmm.config.network import NetworkConfig, NetworkUpdate
    from vmm.session import Session


def _same_id(rest: list[str], body: NetworkConfig | NetworkUpdate) -> None:
    if rest[0] != body.iface_id:
        raise RequestError(f"The id from the path [{rest[0]}] does not match the id from the body [{body.iface_id}]!")


def _update(session: Session, iface_id: str, update: NetworkUpdate) -> None:
    rx = update.rx_rate_limiter or RateLimiterConfig()
    tx = update.tx_rate_limiter or RateLimiterConfig()
    session.machine.update_net_rate_limiters(iface_id, rx.bandwidth, rx.ops, tx.bandwidth, tx.ops)


ENDPOINTS = (
    Endpoint(
        "PUT", "network-interfaces/{id}", NETWORK,
        lambda session, _id, config: session.resources.network_interfaces.insert(config), refuse_hotplug,
        "Network config error", counted="network", boot_specific=True, check=_same_id, section="network-interfaces",
    ),
    Endpoint(
        "PATCH", "network-interfaces/{id}", NETWORK_UPDATE, None, _update,
        "Network config error: Unable to update the net device", counted="network", check=_same_id,
    ),
    Endpoint("DELETE", "network-interfaces/{id}", None, None, refuse_hotplug),
)  # fmt: skip
