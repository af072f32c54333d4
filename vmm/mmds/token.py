"""Session tokens of metadata service version 2: they carry their own expiry, and a key of ours vouches for it.

A token is base64 of 12 random bytes, 8 bytes expiry (milliseconds of CLOCK_MONOTONIC, little-endian) and a 16-byte
tag, keyed BLAKE2b (RFC 7693) over both and the id of the microVM. docs/adr/mmds-tokens.md says why not AES-GCM.
"""

from __future__ import annotations

import binascii
import os
import time

# The public module, hashlib, loads OpenSSL, which costs more than the rest of the control plane together.
from _blake2 import blake2b
from _operator import _compare_digest as equal_in_constant_time

from base.lean_typing import TYPE_CHECKING
from vmm.errors import VmmError

if TYPE_CHECKING:
    from base.lean_typing import Callable

MIN_TTL_SECONDS = 1
MAX_TTL_SECONDS = 21600
_KEY_LENGTH = 32
_NONCE_LENGTH = 12
_EXPIRY_LENGTH = 8
_TAG_LENGTH = 16
_LENGTH = _NONCE_LENGTH + _EXPIRY_LENGTH + _TAG_LENGTH
#: Longer texts are refused unseen.
MAX_TOKEN_LENGTH = 70
#: A key is used for so many tokens; then it is replaced, and all tokens before are invalid.
MAX_TOKENS_PER_KEY = (1 << 32) - 1


class TokenError(VmmError):
    """A token cannot be made as asked."""

    code = "vmm.mmds_token"


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class TokenAuthority:
    """Makes and checks tokens for one microVM; ``now_ms`` is the clock."""

    def __init__(self, microvm_id: str, now_ms: Callable[[], int] = _now_ms) -> None:
        self._context = f"microvmid={microvm_id}".encode()
        self._now_ms = now_ms
        self._key = os.urandom(_KEY_LENGTH)
        self._count = 0

    def generate(self, ttl_seconds: int) -> str:
        """Return a token that is valid for so long. Raises TokenError."""
        if not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
            raise TokenError(
                f"Invalid time to live value provided for token: {ttl_seconds}. Please provide a value between "
                f"{MIN_TTL_SECONDS} and {MAX_TTL_SECONDS}."
            )
        if self._count == MAX_TOKENS_PER_KEY:
            self._key = os.urandom(_KEY_LENGTH)
            self._count = 0
        self._count += 1
        expiry = self._now_ms() + ttl_seconds * 1000
        claim = os.urandom(_NONCE_LENGTH) + expiry.to_bytes(_EXPIRY_LENGTH, "little")
        return binascii.b2a_base64(claim + self._tag(claim), newline=False).decode()

    def is_valid(self, token: str) -> bool:
        """Tell whether a token is one of ours and not expired."""
        if len(token) > MAX_TOKEN_LENGTH:
            return False
        try:
            data = binascii.a2b_base64(token.encode("ascii"), strict_mode=True)
        except ValueError:  # binascii.Error and UnicodeEncodeError are both
            return False
        if len(data) != _LENGTH:
            return False
        claim, tag = data[:-_TAG_LENGTH], data[-_TAG_LENGTH:]
        if not equal_in_constant_time(self._tag(claim), tag):
            return False
        return int.from_bytes(claim[_NONCE_LENGTH:], "little") > self._now_ms()

    def _tag(self, claim: bytes) -> bytes:
        return blake2b(claim + self._context, key=self._key, digest_size=_TAG_LENGTH).digest()
