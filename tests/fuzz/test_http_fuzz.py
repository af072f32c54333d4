"""The HTTP parser and the whole way of a request against mutated and invented input: documented answers only."""

from __future__ import annotations

import pytest

from tests.harness.fuzzing import FULL, run
from tests.harness.run_options import Scale

pytestmark = [pytest.mark.soak("fuzz", "http_fuzz"), pytest.mark.timeout(1800)]


def test_parser(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("api_fuzz", "http", seed, count)
    assert outcomes["Request"] > count // 2
    assert outcomes["ProtocolError"] > count // 5
    assert outcomes["Continue"] > count // 200


def test_no_client_is_ever_out_of_step(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("api_fuzz", "in-step", seed, count)
    assert outcomes["answers"] > count
    assert outcomes["refused"] > count // 10
    assert outcomes["closed"] > count // 20


def test_whole_requests(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("api_fuzz", "api", seed, count)
    for status in ("200", "204", "400"):
        assert outcomes[status] > count // 20
