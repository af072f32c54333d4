"""How a cell describes a defect."""

from __future__ import annotations

import re

import pytest

from jailer.cell import describe_error


def test_a_defect_is_described_in_one_line_without_source() -> None:
    with pytest.raises(KeyError) as error:
        dict[str, int]()["missing"]
    assert re.search(r"^KeyError: 'missing' at \w+\.py:\d+$", describe_error(error.value))
    assert describe_error(ValueError("x")) == "ValueError: x"
