"""Rate limiters in requests: token buckets for bytes and for operations."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.json.schema import U64, Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class TokenBucketConfig(NamedTuple):
    """``size`` tokens that refill in ``refill_time`` ms, and a burst that is used first and never refilled."""

    size: int
    one_time_burst: int | None
    refill_time: int

    def to_json(self) -> JsonValue:
        """Return what clients are shown: null for a bucket that limits nothing, null for a burst of 0."""
        if not self.size or not self.refill_time:
            return None
        return {"size": self.size, "one_time_burst": self.one_time_burst or None, "refill_time": self.refill_time}


class RateLimiterConfig(NamedTuple):
    """Limits for bytes (``bandwidth``) and for operations (``ops``); None: no limit, or no change in an update."""

    bandwidth: TokenBucketConfig | None = None
    ops: TokenBucketConfig | None = None

    def updated(self, update: RateLimiterConfig) -> RateLimiterConfig:
        """Return the limiter after a change: buckets that are not given stay as they are."""
        return RateLimiterConfig(update.bandwidth or self.bandwidth, update.ops or self.ops)


def limiter_json(limiter: RateLimiterConfig | None) -> JsonValue:
    """Return what clients are shown of a limiter: null if it limits nothing."""
    if limiter is None:
        return None
    bandwidth = None if limiter.bandwidth is None else limiter.bandwidth.to_json()
    ops = None if limiter.ops is None else limiter.ops.to_json()
    return None if bandwidth is None and ops is None else {"bandwidth": bandwidth, "ops": ops}


TOKEN_BUCKET = Object(
    "TokenBucketConfig",
    TokenBucketConfig,
    Field("size", U64),
    Field("one_time_burst", Option(U64)),
    Field("refill_time", U64),
    ignore_unknown=True,
)
RATE_LIMITER = Object(
    "RateLimiterConfig",
    RateLimiterConfig,
    Field("bandwidth", Option(TOKEN_BUCKET)),
    Field("ops", Option(TOKEN_BUCKET)),
)
