"""Fixtures of the tests of base."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from base.event_manager import EventManager


@pytest.fixture
def manager() -> Iterator[EventManager]:
    manager = EventManager()
    yield manager
    manager.close()


@pytest.fixture
def make_eventfd() -> Iterator[Callable[..., int]]:
    made: list[int] = []

    def make(value=0):
        made.append(os.eventfd(value, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            pass
