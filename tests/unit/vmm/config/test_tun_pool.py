"""The TUN descriptors that the controller was given."""

from __future__ import annotations

import errno
import os

import pytest

from ipc.launch_plan import TunDescriptors
from vmm.config.resources import VmResources
from vmm.config.tun_pool import TunPool
from vmm.errors import DeviceError


def _opened(count: int, error: int = 0) -> TunDescriptors:
    return TunDescriptors(tuple(os.open(os.devnull, os.O_RDWR) for _ in range(count)), error)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_what_is_taken_belongs_to_the_caller() -> None:
    opened = _opened(3)
    pool = TunPool(opened)
    taken = pool.take()
    assert taken in opened.descriptors
    pool.close()
    assert [_is_open(each) for each in opened.descriptors].count(True) == 1
    assert _is_open(taken)
    os.close(taken)
    pool.close()  # once is enough, twice does nothing


@pytest.mark.parametrize(
    ("error", "text"),
    [(errno.ENOENT, "No such file or directory (os error 2)"), (0, "every TUN descriptor of this microVM was used")],
)
def test_without_one_the_reason_is_told(error: int, text: str) -> None:
    pool = TunPool(_opened(1, error))
    os.close(pool.take())
    with pytest.raises(DeviceError) as caught:
        pool.take()
    assert str(caught.value) == text


@pytest.mark.parametrize("end", ["started", "close"])
def test_the_configuration_closes_them_when_no_interface_can_come(end: str) -> None:
    opened = _opened(2)
    resources = VmResources(tun=TunPool(opened))
    getattr(resources, end)()
    assert not any(map(_is_open, opened.descriptors))
