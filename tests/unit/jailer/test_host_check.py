"""The check of the host: what is missing, and how to mend it."""

from __future__ import annotations

from jailer import host_check


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
