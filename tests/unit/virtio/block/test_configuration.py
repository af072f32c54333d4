"""What a drive is configured with, as it travels to the process that serves it."""

from __future__ import annotations

import pytest

from ipc.errors import MessageError
from virtio.block.configuration import BLOCK_CONFIGURATION, MAX_ID, MAX_QUEUES, BlockConfiguration, BlockSettings
from virtio.rate_limiter import Bucket

PLAIN = BlockConfiguration("root", "Sync", BlockSettings(), Bucket(0, 0), Bucket(0, 0))
FULL = BlockConfiguration(
    "d" * MAX_ID, "Async", BlockSettings(True, True, True, MAX_QUEUES, 0), Bucket(1 << 40, 100, 1 << 50), Bucket(1, 1)
)


@pytest.mark.parametrize("configuration", [PLAIN, FULL])
def test_it_arrives_as_it_was_sent(configuration):
    plain = [[*each] if isinstance(each, tuple) else each for each in configuration]
    assert BLOCK_CONFIGURATION.accept(plain) == configuration


@pytest.mark.parametrize(
    "wrong",
    [
        PLAIN._replace(id="d" * (MAX_ID + 1)),
        PLAIN._replace(settings=BlockSettings(queues=0)),
        PLAIN._replace(settings=BlockSettings(queues=MAX_QUEUES + 1)),
        PLAIN._replace(settings=BlockSettings(look_ns=1 << 40)),
        PLAIN._replace(ops=Bucket(-1, 0)),
        PLAIN._replace(bandwidth=Bucket(1 << 64, 0)),
        [*PLAIN[:1], b"Sync", *PLAIN[2:]],
    ],
)
def test_what_is_out_of_bounds_is_refused(wrong):
    with pytest.raises(MessageError):
        BLOCK_CONFIGURATION.accept([*wrong])
