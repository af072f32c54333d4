"""Answers of a worker: only what was asked for, once, to whoever asked."""

from __future__ import annotations

import pytest

from vmm.cells.replies import Replies


@pytest.fixture
def replies():
    return Replies()


def test_an_answer_is_kept_or_called_back_for(replies):
    got: list[str] = []
    replies.expect(1, None)
    replies.expect(2, got.append)
    assert len(replies) == 1
    assert not replies.has(1)
    assert replies.arrive(1, "one")
    assert replies.arrive(2, "two")
    assert got == ["two"]
    assert replies.has(1)
    assert replies.take(1) == "one"
    assert len(replies) == 0


def test_what_nobody_asked_for_is_told(replies):
    got: list[str] = []
    assert not replies.arrive(1, "x")
    replies.expect(1, None)
    assert replies.arrive(1, "x")
    assert not replies.arrive(1, "again")
    assert replies.take(1) == "x"
    assert not replies.arrive(1, "again")
    replies.expect(2, got.append)
    assert replies.arrive(2, "y")
    assert not replies.arrive(2, "again")
    assert got == ["y"]


def test_an_answer_that_comes_too_late_is_no_breach_once(replies):
    replies.expect(1, None)
    assert replies.take(1) is None
    assert replies.arrive(1, "late")
    assert not replies.arrive(1, "again")


def test_after_the_end_nobody_is_called_back(replies):
    replies.expect(1, lambda message: pytest.fail("called back"))
    replies.drop_callbacks()
    assert not replies.arrive(1, "x")
    replies.expect(2, None)
    replies.clear()
    assert not replies.arrive(2, "x")
