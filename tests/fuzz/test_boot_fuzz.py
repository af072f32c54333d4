"""The parsers of vmm.boot against mutated and invented images: only their own errors, no hang, bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fuzz.boot_fuzz import TARGETS
from tests.harness.fuzzing import FULL, run
from tests.harness.run_options import Scale

if TYPE_CHECKING:
    from lab.guest_image import GuestImage

pytestmark = [pytest.mark.soak("fuzz", "boot_fuzz"), pytest.mark.timeout(3600)]


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "real"])
def test_only_errors_of_our_own(target: str, scale: Scale, seed: int) -> None:
    count = scale(300, FULL)
    outcomes = run("boot_fuzz", target, seed, count)
    # Both verdicts must occur, or the examples are too far from real images to test anything.
    if target not in ("cache", "search-anything"):
        assert outcomes.get("accepted", 0) > count // 100
    if target != "cache":
        assert outcomes.get("refused", 0) > count // 8
    else:
        assert outcomes.get("accepted", 0) == outcomes["examples"]


def test_a_mutated_real_kernel(scale: Scale, seed: int, guest_image: GuestImage) -> None:
    count = scale(60, FULL)
    outcomes = run("boot_fuzz", "real", seed, count, str(guest_image.vmlinuz))
    assert outcomes["examples"] == count
    assert outcomes.get("accepted", 0) > 0
    assert outcomes.get("refused", 0) > count // 8
