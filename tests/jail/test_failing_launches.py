"""A launch that fails at any of its system calls, or is killed there, leaves nothing and says why in one line."""

from __future__ import annotations

import random
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.failing_launch import CODE, ERROR, JANITOR, Outcome, Place, strikes
from tests.harness.run_options import Scale
from tests.harness.system_call_faults import Strike

#: Launches at a time: most of a launch is waiting for us.
_TOGETHER = 4


@contextmanager
def _place(*options: str, prepared: bool = False) -> Iterator[Place]:
    directory = Path("/tmp") / f"jail-{secrets.token_hex(4)}"
    place = Place(directory, options, prepared=prepared)
    try:
        yield place
    finally:
        place.clear()
        shutil.rmtree(directory, ignore_errors=True)


def _launch(strike: Strike | None, *options: str, prepared: bool = False, told: int = 0) -> Outcome:
    with _place(*options, prepared=prepared) as place:
        return place.launch(strike, told)


def _calls(*options: str, prepared: bool) -> dict[int, list[str]]:
    """Return the calls of a launch in which nothing fails."""
    outcome = _launch(None, *options, prepared=prepared)
    assert outcome.code == (0 if "--new-pid-ns" in options else CODE), outcome
    assert outcome.launched
    assert outcome.lines == []
    return outcome.calls


def _each(launch: Callable[[tuple[int, int]], list[str]], chosen: list[tuple[int, int]]) -> list[str]:
    """Launch once for each of these calls; return what is wrong."""
    with ThreadPoolExecutor(_TOGETHER) as together:
        return [complaint for complaints in together.map(launch, chosen) for complaint in complaints]


def _choose(calls: dict[int, list[str]], processes: set[int], count: int | None, seed: int) -> list[tuple[int, int]]:
    """Return some or all of the calls of these processes: of each name first those that are made only a few times."""
    chosen = [each for each in strikes(calls) if each[0] in processes]
    if count is None:
        return chosen
    names = [calls[process][number - 1] for process, number in chosen]
    dice = random.Random(seed)
    order = sorted(range(len(chosen)), key=lambda at: (names[:at].count(names[at]), dice.random()))
    return [chosen[at] for at in order[:count]]


@pytest.mark.soak("launch")
@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "prepared"])
def test_each_system_call_fails(scale: Scale, seed: int, prepared: bool) -> None:
    """``prepared``: the jail root is there before, with a file and a directory of the client, and stays as it was."""
    calls = _calls(prepared=prepared)

    def launch(call: tuple[int, int]) -> list[str]:
        outcome = _launch(Strike(*call, errno=ERROR), prepared=prepared)
        where = f"process {call[0]}, call {call[1]} ({outcome.struck})"
        return [f"{where}: {each}: {outcome.lines}" for each in outcome.complaints()]

    count: int | None = scale(10 if prepared else 30, None)
    chosen = _choose(calls, {*calls}, count, seed + prepared)
    wrong = _each(launch, chosen)
    print(f"{len(chosen)} system calls failed, {len(wrong)} launches were not undone or not explained")
    assert wrong == []


@pytest.mark.soak("launch")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--cleanup",), ("--new-pid-ns",)], ids=str)
def test_a_launch_is_killed_at_each_system_call(
    scale: Scale, seed: int, number: signal.Signals, options: tuple[str, ...]
) -> None:
    """SIGTERM ends the microVM in order once it is there, so it may come at any time, too."""
    calls = _calls(*options, prepared=True)

    def launch(call: tuple[int, int]) -> list[str]:
        outcome = _launch(Strike(*call, kill=number), *options, prepared=True, told=calls[JANITOR].count("recvmsg"))
        # With --cleanup the jail root is removed with what the client has put there, as soon as it is the microVM's.
        remains = [each for each in outcome.remains() if options != ("--cleanup",) or not each.startswith("-")]
        return [f"process {call[0]}, call {call[1]} ({outcome.struck}): {remains}"] if remains else []

    count: int | None = scale(3, None)
    chosen = _choose(calls, {*calls} - {JANITOR - 1, JANITOR}, count, seed + number)
    wrong = _each(launch, chosen)
    print(f"{number.name} at {len(chosen)} system calls, {len(wrong)} launches were not undone")
    assert wrong == []
