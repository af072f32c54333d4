"""Custom filters: what both programs allow is allowed, by the judgement of an interpreter of BPF."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellblock.seccompiler.compiler import compile_filters
from cellblock.seccompiler.source import Action, Condition, Rule, ThreadFilter
from ipc.filter_file import encode
from jailer.errors import PolicyError
from jailer.seccomp import custom
from jailer.seccomp.install import RET_KILL_PROCESS, RET_LOG, Filter, for_process, load
from tests.harness.bpf import RET_ALLOW, RET_ERRNO, evaluate

OWN_PID = 4711
READ, WRITE, TGKILL, GETPID, IOCTL = 0, 1, 234, 39, 16
KVM_RUN = 0xAE80


@pytest.fixture(scope="module")
def ours() -> Filter:
    return load(("vcpu",), "kill").filters["vcpu"]


def compiled(default: str, action: Action, *rules: Rule) -> bytes:
    return compile_filters({"vcpu": ThreadFilter(Action(default), action, rules)}, "x86_64")["vcpu"]


def expected(*answers: int) -> int:
    """Return the first refusal, else whether one of them logs."""
    for answer in answers:
        if answer not in (RET_ALLOW, RET_LOG):
            return answer
    return RET_LOG if RET_LOG in answers else RET_ALLOW


CALLS = st.tuples(
    st.one_of(st.sampled_from([READ, WRITE, TGKILL, GETPID, IOCTL]), st.integers(0, 460)),
    st.tuples(*[st.one_of(st.sampled_from([0, 1, OWN_PID, 34, KVM_RUN]), st.integers(0, 2**64 - 1))] * 6),
)
CUSTOM = [
    compiled("allow", Action("errno", 5), Rule("write", (Condition(0, "dword", "eq", 1),))),
    compiled("trap", Action("allow"), Rule("read"), Rule("write"), Rule("tgkill"), Rule("ioctl")),
    compiled("log", Action("kill_process"), Rule("getpid")),
    compiled("kill_process", Action("log"), Rule("read"), Rule("tgkill")),
]


@given(CALLS, st.lists(st.integers(0, len(CUSTOM) - 1), min_size=1, max_size=2))
def test_the_first_refusal_counts(call, chosen):
    own = load(("vcpu",), "kill").filters["vcpu"]
    joined = custom.add(own, [("vcpu", CUSTOM[each]) for each in chosen])
    number, arguments = call
    wanted = expected(
        evaluate(for_process(own, OWN_PID), number, arguments),
        *(evaluate(CUSTOM[each], number, arguments) for each in chosen),
    )
    assert evaluate(for_process(joined, OWN_PID), number, arguments) == wanted


def test_the_own_process_is_still_known(ours):
    joined = for_process(custom.add(ours, [("vcpu", CUSTOM[3])]), OWN_PID)
    assert evaluate(joined, TGKILL, (OWN_PID, 1, 34)) == RET_LOG
    assert evaluate(joined, TGKILL, (OWN_PID + 1, 1, 34)) == RET_KILL_PROCESS


def test_errors_of_custom_rules_come_back(ours):
    joined = for_process(custom.add(ours, [("vcpu", CUSTOM[0])]), OWN_PID)
    assert evaluate(joined, WRITE, (1,)) == RET_ERRNO | 5
    assert evaluate(joined, WRITE, (2,)) == RET_ALLOW


def test_two_programs_may_be_too_long_together(ours):
    allow = struct.pack("<HBBI", 0x06, 0, 0, RET_ALLOW)
    with pytest.raises(PolicyError, match=r"too long: 4\d+ instructions with ours, 4096 are possible"):
        custom.add(ours, [("vcpu", allow * 4000)])


def test_a_computed_answer_is_refused(ours):
    with pytest.raises(PolicyError, match="computes its answer"):
        custom.add(ours, [("vcpu", struct.pack("<HBBI", 0x16, 0, 0, 0))])


def test_a_file_has_exactly_the_threads_of_firecracker(tmp_path: Path):
    allow = struct.pack("<HBBI", 0x06, 0, 0, RET_ALLOW)
    threads = {"vmm": allow, "api": allow, "vcpu": allow}
    good = tmp_path / "good"
    good.write_bytes(encode(threads))
    assert custom.read(str(good)) == threads
    for programs, text in (
        ({**threads, "other": allow}, "Invalid thread category: other"),
        ({"vmm": allow, "api": allow}, "Missing thread category: vcpu"),
    ):
        good.write_bytes(encode(programs))
        with pytest.raises(PolicyError, match=f"Seccomp error: Filter deserialization failed: {text}"):
            custom.read(str(good))


def test_what_is_no_filter_file(tmp_path: Path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(os.urandom(200_000))
    with pytest.raises(PolicyError, match="Seccomp error: Filter deserialization failed: it is larger"):
        custom.read(str(garbage))
    os.mkfifo(tmp_path / "fifo")
    for name, text in (("missing", "No such file"), ("fifo", "is not a file"), (".", "is not a file|Is a directory")):
        with pytest.raises(PolicyError, match=f"Seccomp error: Filter file open error: .*{text}"):
            custom.read(str(tmp_path / name))


def test_a_link_in_the_jail_leads_nowhere_else(tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "link").symlink_to("../outside")
    (root / "absolute").symlink_to(tmp_path / "outside")
    directory = os.open(root, os.O_RDONLY)
    try:
        for name in ("link", "/absolute", "../outside"):
            with pytest.raises(PolicyError, match="No such file"):
                custom.read(name, directory)
    finally:
        os.close(directory)
