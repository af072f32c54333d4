"""`./dev bench loop`: what the event loop costs for a descriptor that is ready and for a timer that is due.

With `--beside FOLDER`, another checkout's loop is measured in the same run, in turn: the baseline. Each loop runs in a
process of its own, with no other import of its checkout. docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.loop_inner import CASES
from bench.measure import BenchError, median, spread, table
from devtool.project import ROOT

INNER = ROOT / "bench" / "loop_inner.py"
ROUNDS = 25


class Measured:
    """The process that has one checkout's loop."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(INNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
        )

    def measure(self, case: str, straight: bool) -> float:
        """Return the microseconds of one case."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([case, straight]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError("a loop that was to be measured has ended") from None
        answer = self._process.stdout.readline()
        if not answer:
            raise BenchError("a loop that was to be measured has ended")
        return float(json.loads(answer)) / 1000

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(rounds: int, beside: Path | None) -> dict[str, list[list[float]]]:
    """Return, by case, what this checkout's loop took in each round and, if there is one, what the other one took."""
    here = Measured(ROOT)
    there = Measured(beside) if beside is not None else None
    costs: dict[str, list[list[float]]] = {case: [[], []] for case in CASES}
    try:
        for number in range(rounds + 1):
            for case, (ours, theirs) in costs.items():
                one = here.measure(case, True)
                other = there.measure(case, False) if there is not None else None
                if number:  # the first round warms up
                    ours.append(one)
                    if other is not None:
                        theirs.append(other)
    finally:
        here.close()
        if there is not None:
            there.close()
    return costs


def report(costs: dict[str, list[list[float]]]) -> None:
    """Print a line per case; ratios are formed within a round."""
    rows = []
    for case, (ours, theirs) in costs.items():
        if theirs:
            ratio = median([one / other for one, other in zip(ours, theirs, strict=True)])
            rows.append([case, spread(theirs), spread(ours), f"{ratio:.2f}"])
        else:
            rows.append([case, "", spread(ours), ""])
    table(("µs, medians (quartiles)", "beside", "this loop", "ratio"), rows)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="./dev bench loop", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, whose loop is the baseline")
    options = parser.parse_args()
    report(measure(options.rounds, options.beside))
    return 0


if __name__ == "__main__":
    sys.exit(main())
