"""What the benchmark of the exits makes of its samples; no time is measured here."""

from __future__ import annotations

from bench import exits


def test_the_local_answer_is_compared_with_both(capsys):
    costs = {name: [exits.Cost(10.0, 10.0)] for name in (*exits.PRODUCT, exits.BARE, exits.QEMU)}
    costs[exits.LOCAL_LSR] = [exits.Cost(11.0, 11.0)]
    exits._report(costs)
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("reached", "MISSED"))]
    assert len(verdicts) == 2
    assert all("1.10" in line for line in verdicts)
