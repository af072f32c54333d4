"""Every virtio device, as the conformance tests and the fuzzers make it: with ``state=``, or as it is when new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tests.harness.drives import backing_file
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.block.uring_engine import UringEngine
from virtio.device import VirtioDevice
from virtio.entropy import Entropy
from virtio.rate_limiter import Bucket, RateLimiter


@contextmanager
def entropy(**state: Any) -> Iterator[VirtioDevice]:
    yield Entropy("rng", **state)


@contextmanager
def limited_entropy(**state: Any) -> Iterator[VirtioDevice]:
    yield Entropy("rng", RateLimiter(Bucket(1 << 20, 100), Bucket(1000, 100, 10)), **state)


@contextmanager
def block(**state: Any) -> Iterator[VirtioDevice]:
    yield Block("drive", FileEngine(backing_file()), BlockSettings(), **state)


@contextmanager
def block_io_uring(**state: Any) -> Iterator[VirtioDevice]:
    yield Block("drive", UringEngine(backing_file()), BlockSettings(writeback=True, queues=2), **state)


@contextmanager
def block_threads(**state: Any) -> Iterator[VirtioDevice]:
    limiter = RateLimiter(Bucket(1 << 20, 100), Bucket(1000, 100, 10))
    yield Block("drive", ThreadEngine(backing_file()), BlockSettings(discard=True), limiter, **state)


MAKERS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "entropy": entropy,
    "entropy with a limiter": limited_entropy,
    "block": block,
    "block, io_uring, two queues": block_io_uring,
    "block, threads, with a limiter": block_threads,
}
