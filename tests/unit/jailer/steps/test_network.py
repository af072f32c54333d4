"""Opening TUN descriptors, and handing a network namespace over."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from ipc import descriptors
from ipc.launch_plan import MAX_DEVICES
from jailer.errors import StepError
from jailer.steps import network


@pytest.mark.parametrize(
    ("limit", "count"), [(3, 0), (64, 0), (67, 0), (68, 1), (100, 9), (188, MAX_DEVICES), (1 << 20, MAX_DEVICES)]
)
def test_a_quarter_of_the_files_above_64_at_the_most(monkeypatch: pytest.MonkeyPatch, limit: int, count: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit, limit))
    opened = network.open_tun(os.devnull)
    assert (len(opened.descriptors), opened.error) == (count, 0)
    for each in opened.descriptors:
        assert not os.get_blocking(each)
        assert not os.get_inheritable(each)
        os.close(each)


def test_a_host_without_tun_is_no_error_yet() -> None:
    assert network.open_tun("/no/such/device") == ((), errno.ENOENT)


def test_a_supervisor_that_ended_is_no_namespace() -> None:
    ours, theirs = descriptors.channel_pair()
    ours.close()
    with theirs, pytest.raises(StepError, match="the supervisor has none"):
        network.join_network(theirs)
