"""Configuration of the metadata service: PUT /mmds/config. Its content is in vmm.mmds.store."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.errors import VmmError
from vmm.json.schema import BOOLEAN, STRING, Converted, Field, List, Object, Option, Variant
from vmm.mmds.store import V1, V2

if TYPE_CHECKING:
    from base.lean_typing import Sequence
    from vmm.json.text import JsonValue

DEFAULT_IPV4_ADDRESS = "169.254.169.254"


class MmdsConfigError(VmmError):
    """The metadata service cannot be configured as asked."""

    code = "vmm.mmds_config"


class MmdsConfig(NamedTuple):
    """Body of PUT /mmds/config. ``imds_compat`` has every answer in the text format of EC2's service."""

    version: str
    network_interfaces: list[str]
    ipv4_address: str | None
    imds_compat: bool

    def to_json(self, interfaces: Sequence[str]) -> JsonValue:
        """Return the ``mmds-config`` section of GET /vm/config; ``interfaces`` are all there are, in their order."""
        return {
            "version": self.version,
            "network_interfaces": [name for name in interfaces if name in self.network_interfaces],
            "ipv4_address": self.ipv4_address or DEFAULT_IPV4_ADDRESS,
            "imds_compat": self.imds_compat,
        }

    def check(self, interfaces: Sequence[str]) -> None:
        """Raise MmdsConfigError if the service cannot be reached like this."""
        if self.ipv4_address is not None and not is_link_local(self.ipv4_address):
            raise MmdsConfigError("The MMDS IPv4 address is not link local.")
        if not self.network_interfaces:
            raise MmdsConfigError("The list of network interface IDs that allow forwarding MMDS requests is empty.")
        if not set(self.network_interfaces).issubset(interfaces):
            raise MmdsConfigError(
                "The list of network interface IDs provided contains at least one ID that does not correspond to any "
                "existing network interface."
            )


def ipv4_address(text: str) -> str | None:
    """Return a dotted IPv4 address; None if it is none (RFC 6943, section 3.1.1, the strict form)."""
    parts = text.split(".")
    if len(parts) != 4:
        return None
    for part in parts:
        if not (part.isascii() and part.isdecimal()) or len(part) > 3 or (part[0] == "0" and part != "0"):
            return None
        if int(part) > 255:
            return None
    return text


def is_link_local(address: str) -> bool:
    """Tell whether an address is one that a link-local host may have (RFC 3927, section 2.1)."""
    first, second, third, _ = address.split(".")
    return (first, second) == ("169", "254") and third not in ("0", "255")


MMDS_CONFIG = Object(
    "MmdsConfig",
    MmdsConfig,
    Field("version", Variant(V1, V2), V1),
    Field("network_interfaces", List(STRING)),
    Field("ipv4_address", Option(Converted(ipv4_address, "invalid IPv4 address syntax"))),
    Field("imds_compat", BOOLEAN, False),
)
