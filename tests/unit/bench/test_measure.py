"""What the benchmarks share, and that each explains itself; no time is measured here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import measure
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
