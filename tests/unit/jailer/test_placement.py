"""Whether vCPUs get a worker each or share one: what the KVM module says."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailer import placement


@pytest.mark.parametrize(
    ("module", "parameter", "value", "kind"),
    [
        ("kvm_intel", "ept", "Y\n", "split"),
        ("kvm_intel", "ept", "N\n", "grouped"),
        ("kvm_amd", "npt", "1\n", "split"),
        ("kvm_amd", "npt", "0\n", "grouped"),
        ("kvm_pvm", "ept", "Y\n", "grouped"),
    ],
)
def test_placement(tmp_path: Path, module: str, parameter: str, value: str, kind: str) -> None:
    directory = tmp_path / module / "parameters"
    directory.mkdir(parents=True)
    (directory / parameter).write_text(value)
    assert placement.detect(str(tmp_path)).kind == kind
