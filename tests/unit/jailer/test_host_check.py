"""The check of the host: what is missing, and how to mend it."""

from __future__ import annotations

import pytest

from jailer import host_check, landlock


def test_host_check_tells_what_is_missing_and_how_to_mend_it() -> None:
    findings = [
        host_check.Finding("one", host_check.GOOD, "fine", "unused"),
        host_check.Finding("two", host_check.BAD, "broken", "mend it"),
    ]
    assert host_check.report(findings) == (
        "     ok  one: fine\nMISSING  two: broken\n         → mend it\n1 of 2 checks failed.\n"
    )
    missing = host_check.check_kvm("/no/such/device")
    assert [finding.state for finding in missing] == [host_check.BAD]
    assert "load kvm_intel or kvm_amd" in missing[0].remedy
    not_kvm = host_check.check_kvm("/dev/null")
    assert [finding.state for finding in not_kvm] == [host_check.BAD]


@pytest.mark.parametrize(
    ("level", "state", "text"),
    [
        (0, host_check.WORSE, "none: the other walls alone bound files, sockets and signals"),
        (2, host_check.WORSE, "ABI 2: nothing on truncation, TCP, device requests, abstract sockets and signals"),
        (5, host_check.WORSE, "ABI 5: nothing on abstract sockets and signals"),
        (7, host_check.GOOD, "ABI 7: files, truncation, TCP, device requests, abstract sockets and signals"),
    ],
)
def test_the_level_of_landlock(monkeypatch: pytest.MonkeyPatch, level: int, state: str, text: str) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: level)
    finding = host_check.check_landlock()
    assert (finding.state, finding.text) == (state, text)
    assert finding.remedy or state == host_check.GOOD
