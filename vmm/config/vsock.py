"""The vsock device: PUT /vsock."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.errors import VmmError
from vmm.json.schema import STRING, U32, Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

#: Lower context identifiers are reserved (linux/vm_sockets.h: hypervisor, local, host).
MIN_GUEST_CID = 3


class VsockError(VmmError):
    """The vsock device cannot be configured as asked."""

    code = "vmm.vsock"


class VsockConfig(NamedTuple):
    """Body of PUT /vsock. ``vsock_id`` is deprecated and means nothing."""

    vsock_id: str | None
    guest_cid: int
    uds_path: str

    def to_json(self) -> JsonValue:
        """Return the ``vsock`` section of GET /vm/config."""
        return {"guest_cid": self.guest_cid, "uds_path": self.uds_path}

    def check(self) -> None:
        """Raise VsockError if there can be no such device."""
        if self.guest_cid < MIN_GUEST_CID:
            raise VsockError(f"The guest CID {self.guest_cid} is reserved: it must be at least {MIN_GUEST_CID}.")


VSOCK = Object(
    "VsockDeviceConfig",
    VsockConfig,
    Field("vsock_id", Option(STRING), None),
    Field("guest_cid", U32),
    Field("uds_path", STRING),
)
