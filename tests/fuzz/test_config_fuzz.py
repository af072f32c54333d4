"""The configuration file and the JSON reader under it against mutated documents."""

from __future__ import annotations

import pytest

from tests.harness.fuzzing import FULL, run
from tests.harness.run_options import Scale

pytestmark = [pytest.mark.soak("fuzz", "config_fuzz"), pytest.mark.timeout(1800)]


@pytest.mark.parametrize("target", ["config", "json"])
def test_documents(target: str, scale: Scale, seed: int) -> None:
    count = scale(1000, FULL)
    outcomes = run("api_fuzz", target, seed, count)
    assert outcomes["accepted"] > count // 10
    assert outcomes["refused"] > count // 10
