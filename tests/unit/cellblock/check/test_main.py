"""cellblock check without the host: what it prints and what its exit status says. tests/jail has the real one."""

from __future__ import annotations

import pytest

from cellblock.check.main import main
from jailer import host_check
from jailer.host_check import BAD, GOOD, WORSE, Finding

ARGV = ["cellblock check"]


@pytest.mark.parametrize(("states", "status"), [((GOOD, WORSE), 0), ((GOOD, BAD, WORSE), 1)])
def test_the_report_and_the_status_are_those_of_the_jailers_check(states, status, monkeypatch, capsys):
    findings = [Finding("topic", state, "text", "remedy") for state in states]
    monkeypatch.setattr(host_check, "run_checks", lambda: findings)
    assert main(ARGV) == status
    assert capsys.readouterr().out == host_check.report(findings)


def test_it_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        main([*ARGV, "--purge"])
    assert ended.value.code == 2
    assert "cellblock check: error: unrecognized arguments: --purge" in capsys.readouterr().err
