"""The balloon device: /balloon, /balloon/statistics and /balloon/hinting."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.errors import VmmError
from vmm.json.schema import BOOLEAN, U16, U32, Field, Object

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class BalloonError(VmmError):
    """The balloon cannot be configured as asked."""

    code = "vmm.balloon"


class BalloonConfig(NamedTuple):
    """Body of PUT /balloon. ``amount_mib`` is the target size in MiB; an interval of 0 s means no statistics."""

    amount_mib: int
    deflate_on_oom: bool
    stats_polling_interval_s: int
    free_page_hinting: bool
    free_page_reporting: bool

    def to_json(self) -> JsonValue:
        """Return what GET /balloon and GET /vm/config show."""
        return self._asdict()

    def check(self, mem_size_mib: int) -> None:
        """Raise BalloonError if the balloon is larger than the memory."""
        if self.amount_mib > mem_size_mib:
            raise BalloonError("Amount of pages requested is too large.")


BALLOON = Object(
    "BalloonDeviceConfig",
    BalloonConfig,
    Field("amount_mib", U32),
    Field("deflate_on_oom", BOOLEAN),
    Field("stats_polling_interval_s", U16, 0),
    Field("free_page_hinting", BOOLEAN, False),
    Field("free_page_reporting", BOOLEAN, False),
)
#: These three become the only value that they hold.
BALLOON_UPDATE = Object("BalloonUpdateConfig", int, Field("amount_mib", U32))
BALLOON_STATS_UPDATE = Object("BalloonUpdateStatsConfig", int, Field("stats_polling_interval_s", U16))
START_HINTING = Object("StartHintingCmd", bool, Field("acknowledge_on_stop", BOOLEAN, True), ignore_unknown=True)
