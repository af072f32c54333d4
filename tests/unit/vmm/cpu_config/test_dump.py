"""The file that --dump-cpu-config writes."""

from __future__ import annotations

import json

import pytest

from ipc.messages.worker import DumpedCpuConfig
from vmm.cpu_config.dump import DumpError, write

EMPTY = DumpedCpuConfig(0, (), ())


def test_the_file_is_replaced(tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text("x" * 10_000)
    write(EMPTY, str(path))
    assert json.loads(path.read_text()) == {"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no/such", "No such file or directory (os error 2)"), ("", "Is a directory (os error 21)")],
)
def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path, name, reason):
    path = f"{tmp_path}/{name}"
    with pytest.raises(DumpError) as error:
        write(EMPTY, path)
    assert str(error.value) == f"The CPU configuration cannot be written to {path}: {reason}"
