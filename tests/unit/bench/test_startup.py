"""What the benchmark of the start makes of its samples; no time is measured here."""

from __future__ import annotations

import os

from bench import startup


def test_ratios_are_formed_within_a_round(capsys):
    samples = {
        startup.QEMU_START: [startup.Sample(10.0, 10.0), startup.Sample(100.0, 10.0), startup.Sample(20.0, 10.0)],
        "ours": [startup.Sample(20.0, 5.0), startup.Sample(200.0, 5.0), startup.Sample(40.0, 5.0)],
    }
    assert startup._report_times(samples)["ours"] == 2.0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ours"))
    assert row.split()[-2:] == ["2.00", "0.50"]


def test_steps_are_medians_of_what_all_traces_have(capsys):
    def trace(shift: float) -> list[tuple[int, str, float, float]]:
        return [(0, "program", 1.0 + shift, 1.0), (1, "twice", 2.0 + shift, 0.5), (1, "twice", 3.0 + shift, 0.7)]

    startup._report_steps("cold", [trace(0.0), [*trace(5.0), (2, "only here", 9.0, 1.0)], trace(1.0)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["supervisor", "program", "2.0", "1.0"],
        ["controller", "twice", "3.0", "0.5"],
        ["controller", "twice", "4.0", "0.7"],
    ]


def test_memory_is_summed_over_our_cells_only(capsys):
    cell = dict.fromkeys(startup.KINDS, 1.5)
    sums = startup._report_memory([{"firecracker": cell, "vmm": cell, "vcpu 0": cell, "QEMU": cell}])
    assert sums == dict.fromkeys(startup.KINDS, 4.5)
    assert "QEMU" in capsys.readouterr().out


def test_memory_of_a_process_is_read():
    values = startup._rollup(os.getpid())
    assert 1 < values["Private_Dirty"] < values["Rss"] < 4096
