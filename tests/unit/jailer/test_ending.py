"""What is known of the microVM's end."""

from __future__ import annotations

from jailer.ending import Ending


def test_a_controller_that_has_to_end_gets_no_more_time_by_closing_its_channel():
    ending = Ending()
    ending.expect_within(1000)
    soonest = ending.deadline
    assert soonest
    ending.expect_within(2000)
    assert ending.deadline == soonest


def test_nothing_is_known_of_the_end_at_the_start():
    ending = Ending()
    assert (ending.exit_code, ending.dies_by, ending.deadline, ending.ended) == (None, 0, 0.0, False)
