"""Network interfaces: PUT, PATCH and DELETE /network-interfaces/{iface_id}."""

from __future__ import annotations

import errno

from base.errno_text import errno_text
from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.config.rate_limiter import RATE_LIMITER, RateLimiterConfig, limiter_json
from vmm.errors import VmmError
from vmm.json.schema import STRING, U16, Converted, Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

MIN_MTU = 68
#: Longest name of a network device (IFNAMSIZ without its end mark).
MAX_DEVICE_NAME = 15
_HEX = frozenset("0123456789abcdefABCDEF")
_OPEN_FAILED = "Could not create the network device: Open tap device failed: "


class NetworkError(VmmError):
    """A network interface cannot be configured as asked."""

    code = "vmm.network"


class NetworkConfig(NamedTuple):
    """Body of PUT /network-interfaces/{iface_id}. The tap device is opened at the start."""

    iface_id: str
    host_dev_name: str
    guest_mac: str | None
    mtu: int | None
    rx_rate_limiter: RateLimiterConfig | None
    tx_rate_limiter: RateLimiterConfig | None

    def to_json(self) -> JsonValue:
        """Return the entry of ``network-interfaces`` in GET /vm/config."""
        return {
            "iface_id": self.iface_id,
            "host_dev_name": self.host_dev_name,
            "guest_mac": self.guest_mac,
            "mtu": self.mtu,
            "rx_rate_limiter": limiter_json(self.rx_rate_limiter),
            "tx_rate_limiter": limiter_json(self.tx_rate_limiter),
        }


class NetworkUpdate(NamedTuple):
    """Body of PATCH /network-interfaces/{iface_id}."""

    iface_id: str
    rx_rate_limiter: RateLimiterConfig | None
    tx_rate_limiter: RateLimiterConfig | None


def mac_address(text: str) -> str | None:
    """Return a MAC address in lower case; None if it is none."""
    parts = text.split(":")
    if len(parts) != 6 or any(len(part) != 2 or not _HEX.issuperset(part) for part in parts):
        return None
    return text.lower()


NETWORK = Object(
    "NetworkInterfaceConfig",
    NetworkConfig,
    Field("iface_id", STRING),
    Field("host_dev_name", STRING),
    Field("guest_mac", Option(Converted(mac_address, "The provided MAC address is invalid."))),
    Field("mtu", Option(U16)),
    Field("rx_rate_limiter", Option(RATE_LIMITER)),
    Field("tx_rate_limiter", Option(RATE_LIMITER)),
)
NETWORK_UPDATE = Object(
    "NetworkInterfaceUpdateConfig",
    NetworkUpdate,
    Field("iface_id", STRING),
    Field("rx_rate_limiter", Option(RATE_LIMITER)),
    Field("tx_rate_limiter", Option(RATE_LIMITER)),
)


class NetworkInterfaces:
    """The configured interfaces."""

    def __init__(self) -> None:
        self.configs: list[NetworkConfig] = []

    def insert(self, config: NetworkConfig) -> None:
        """Add an interface, or replace the one of the same id. Raises NetworkError, and then nothing has changed."""
        others = [known for known in self.configs if known.iface_id != config.iface_id]
        if config.guest_mac is not None and any(known.guest_mac == config.guest_mac for known in others):
            raise NetworkError(f"The MAC address is already in use: {config.guest_mac}")
        if config.mtu is not None and config.mtu < MIN_MTU:
            raise NetworkError(f"The MTU {config.mtu} is too small: it must be from {MIN_MTU} to 65535.")
        name = config.host_dev_name
        if not name or len(name.encode(errors="replace")) > MAX_DEVICE_NAME:
            raise NetworkError(f"{_OPEN_FAILED}Invalid interface name")
        if any(known.host_dev_name == name for known in others):
            raise NetworkError(
                f"{_OPEN_FAILED}Error while creating ifreq structure: {errno_text(errno.EBUSY)}. Invalid TUN/TAP "
                f"Backend provided by {name}. Check our documentation on setting up the network devices."
            )
        # One that is replaced goes to the end, and the last one to its place, as Firecracker has it.
        place = next((n for n, known in enumerate(self.configs) if known.iface_id == config.iface_id), None)
        if place is not None:
            last = self.configs.pop()
            if place < len(self.configs):
                self.configs[place] = last
        self.configs.append(config)
