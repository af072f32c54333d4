"""Every virtio device, as the conformance tests and the fuzzers make it: with ``state=``, or as it is when new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from virtio.device import VirtioDevice
from virtio.entropy import Entropy
from virtio.rate_limiter import Bucket, RateLimiter


@contextmanager
def entropy(**state: Any) -> Iterator[VirtioDevice]:
    yield Entropy("rng", **state)


@contextmanager
def limited_entropy(**state: Any) -> Iterator[VirtioDevice]:
    yield Entropy("rng", RateLimiter(Bucket(1 << 20, 100), Bucket(1000, 100, 10)), **state)


MAKERS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "entropy": entropy,
    "entropy with a limiter": limited_entropy,
}
