"""A deferral: completed once, taken by one."""

from __future__ import annotations

import pytest

from base.deferral import Deferral


def test_a_deferral_completes_and_is_taken_once():
    deferral = Deferral()
    deferral.complete()
    with pytest.raises(AssertionError):
        deferral.complete()
    with pytest.raises(AssertionError):
        deferral.then(lambda: None)
