"""Random sequences of API requests against a model of the rules: no divergence, no exception, no leak."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.harness.api_model import ApiModel


@pytest.mark.soak("plane")
def test_random_requests_agree_with_the_model(scale):
    """10,000 steps in full."""
    steps = 50
    run_state_machine_as_test(
        ApiModel,
        settings=settings(
            max_examples=scale(60, 200),
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
