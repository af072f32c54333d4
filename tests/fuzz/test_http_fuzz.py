"""The HTTP parser and the whole way of a request against mutated and invented input: documented answers only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.run_options import Scale

ROOT = Path(__file__).resolve().parents[2]
FULL = 20_000

pytestmark = [pytest.mark.soak("fuzz", "http_fuzz"), pytest.mark.timeout(1800)]


def run(target: str, seed: int, count: int) -> dict[str, int]:
    """Run examples in a process of its own, whose address space is limited, and return what became of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.api_fuzz", target, str(seed), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{target}, seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes: dict[str, int] = json.loads(done.stdout)
    assert outcomes["examples"] == count
    return outcomes


def test_parser(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("http", seed, count)
    assert outcomes["Request"] > count // 2
    assert outcomes["ProtocolError"] > count // 5
    assert outcomes["Continue"] > count // 200


def test_no_client_is_ever_out_of_step(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("in-step", seed, count)
    assert outcomes["answers"] > count
    assert outcomes["refused"] > count // 10
    assert outcomes["closed"] > count // 20


def test_whole_requests(scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("api", seed, count)
    for status in ("200", "204", "400"):
        assert outcomes[status] > count // 20
