"""Where the guest's serial console goes: PUT /serial."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from vmm.config.rate_limiter import TOKEN_BUCKET, TokenBucketConfig
from vmm.errors import VmmError
from vmm.json.schema import PATH, Field, Object, Option


class SerialError(VmmError):
    """The file for the serial console cannot be opened."""

    code = "vmm.serial"


class SerialConfig(NamedTuple):
    """Body of PUT /serial: where the guest's console goes, and how fast it may write (tokens are bytes)."""

    serial_out_path: str | None = None
    rate_limiter: TokenBucketConfig | None = None


SERIAL = Object(
    "SerialConfig",
    SerialConfig,
    Field("serial_out_path", Option(PATH)),
    Field("rate_limiter", Option(TOKEN_BUCKET)),
)
