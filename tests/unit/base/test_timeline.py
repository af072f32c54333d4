"""The marks of a start: nothing when off, one clock and no torn line over several processes when on."""

from __future__ import annotations

import os

import pytest

from base import timeline


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setenv(timeline.VARIABLE, "1")
    yield timeline.start_if_asked
    timeline._areas = None
    timeline.enter(0)


def test_nothing_is_recorded_unless_asked(monkeypatch):
    monkeypatch.delenv(timeline.VARIABLE, raising=False)
    timeline.start_if_asked()
    timeline.mark("step")
    assert timeline.collected() == []


def test_marks_of_all_cells_come_in_order_of_time(recording):
    recording()
    for cell in (1, 2):
        pid = os.fork()
        if not pid:
            timeline.enter(cell)
            timeline.mark(f"cell {cell}")
            os._exit(0)
        os.waitpid(pid, 0)
    timeline.mark("the end")
    marks = timeline.collected()
    assert [each[:2] for each in marks] == [(0, "program"), (1, "cell 1"), (2, "cell 2"), (0, "the end")]
    assert all(moment > 0 and cpu > 0 for _, _, moment, cpu in marks)


def test_a_full_area_and_a_cell_without_one_lose_marks_only(recording):
    recording()
    for number in range(1000):
        timeline.mark(f"step {number}")
    marks = timeline.collected()
    assert 50 < len(marks) < 1000
    assert marks[-1][1] == f"step {len(marks) - 2}"
    timeline.enter(timeline.AREAS)
    timeline.mark("nowhere")
    assert timeline.collected() == []
