"""The benchmarks' own parts; no time is measured here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import exits, measure, startup
from bench.measure import BenchError, CpuAccount
from devtool.project import PYTHON, ROOT

BENCHES = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if "argparse" in path.read_text() and path.stem != "__init__"
)


def test_the_benches_that_are_promised_are_there():
    assert {"api", "startup", "exits", "boot"} <= set(BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_explains_itself(name):
    done = subprocess.run(
        [PYTHON, "-m", f"bench.{name}", "--help"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"./dev bench {name}" in done.stdout


def test_spread_shows_the_median_and_how_far_values_lie_apart():
    assert measure.spread([3.0, 1.0, 2.0]) == "2.0 (1.0–3.0)"
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.0 (1.5–4.5)"


def test_tables_are_aligned():
    lines: list[str] = []
    measure.table(("name", "ms"), [["a", "1.0"], ["longer", "100.0"]], lines.append)
    assert lines == ["name       ms", "------  -----", "a         1.0", "longer  100.0"]


@pytest.mark.parametrize(("value", "word"), [(0.2, "reached"), (0.21, "MISSED")])
def test_a_verdict_names_value_and_aim(value, word):
    assert measure.verdict("x", value, 0.2).split() == [word, "x:", f"{value:.2f},", "aim", "at", "most", "0.2"]


@pytest.fixture
def account():
    try:
        made = CpuAccount()
    except OSError as error:  # not root
        pytest.fail(f"the benchmarks need a control group: {error}")
    with made:
        yield made


def test_cpu_time_of_children_and_their_children_counts_and_our_own_does_not(account):
    before = account.read()
    sum(range(3_000_000))
    assert account.read() == before
    work = "if os.fork() == 0:\n    sum(range(3_000_000))\n    os._exit(0)\nos.wait()"
    code = f"import os\n{work}\nprint('done', flush=True)"
    with measure.start([sys.executable, "-c", code], account) as started:
        started.pipes.wait_for(b"done")
        assert started.end() == ""
    assert account.read() > before + 10


def test_a_program_that_ends_early_is_an_error_with_its_words(account):
    with (
        pytest.raises(BenchError, match="no such luck"),
        measure.start([sys.executable, "-c", "raise SystemExit('no such luck')"], account) as started,
    ):
        started.pipes.wait_for(b"never")
    with pytest.raises(ChildProcessError):
        os.waitpid(started.pid, os.WNOHANG)


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


def test_the_local_answer_is_compared_with_both(capsys):
    costs = {name: [exits.Cost(10.0, 10.0)] for name in (*exits.PRODUCT, exits.BARE, exits.QEMU)}
    costs[exits.LOCAL_LSR] = [exits.Cost(11.0, 11.0)]
    exits._report(costs)
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("reached", "MISSED"))]
    assert len(verdicts) == 2
    assert all("1.10" in line for line in verdicts)
