"""The parsers of vmm.boot against mutated and invented images: only their own errors, no hang, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.boot_fuzz import TARGETS
from tests.harness.run_options import Scale

if TYPE_CHECKING:
    from lab.guest_image import GuestImage

ROOT = Path(__file__).resolve().parents[2]
FULL = 20_000

pytestmark = [pytest.mark.soak("fuzz", "boot_fuzz"), pytest.mark.timeout(3600)]


def run(target: str, seed: int, count: int, *arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.boot_fuzz", target, str(seed), str(count), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{target}, seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes: dict[str, int] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "real"])
def test_only_errors_of_our_own(target: str, scale: Scale, seed: int) -> None:
    count = scale(300, FULL)
    outcomes = run(target, seed, count)
    assert outcomes["examples"] >= count
    # Both verdicts must occur, or the examples are too far from real images to test anything.
    if target not in ("cache", "search-anything"):
        assert outcomes.get("accepted", 0) > count // 100
    if target != "cache":
        assert outcomes.get("refused", 0) > count // 8
    else:
        assert outcomes.get("accepted", 0) == outcomes["examples"]


def test_a_mutated_real_kernel(scale: Scale, seed: int, guest_image: GuestImage) -> None:
    count = scale(60, FULL)
    outcomes = run("real", seed, count, str(guest_image.vmlinuz))
    assert outcomes["examples"] == count
    assert outcomes.get("accepted", 0) > 0
    assert outcomes.get("refused", 0) > count // 8
