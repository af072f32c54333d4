"""The entropy device: PUT /entropy."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.config.rate_limiter import RATE_LIMITER, RateLimiterConfig, limiter_json
from vmm.json.schema import Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class EntropyConfig(NamedTuple):
    """Body of PUT /entropy."""

    rate_limiter: RateLimiterConfig | None

    def to_json(self) -> JsonValue:
        """Return the ``entropy`` section of GET /vm/config."""
        return {"rate_limiter": limiter_json(self.rate_limiter)}


ENTROPY = Object("EntropyDeviceConfig", EntropyConfig, Field("rate_limiter", Option(RATE_LIMITER)))
