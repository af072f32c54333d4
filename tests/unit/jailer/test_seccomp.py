"""The policies: the language, and that each compiled filter does exactly what its text says."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailer.errors import PolicyError
from jailer.seccomp import install, notification
from jailer.seccomp.compile import ROLES, cache_key, compile_policy, pack, sha256, unpack
from jailer.seccomp.names import SYSCALL_NAMES
from jailer.seccomp.policy import ALLOWED, OWN_PROCESS, Condition, Policy, Rule, full_text, parse, read_text
from tests.harness import bpf

NUMBERS = {name: number for number, name in SYSCALL_NAMES.items()}
X32_BIT = 0x40000000


def _parse(text: str, **others: str) -> Policy:
    return parse("main", lambda role: {"main": text, **others}[role])


def _meaning(policy: Policy, name: str, arguments: tuple[int, ...], default: int) -> set[int]:
    """Return what the text says about a call, straight from the rules: every answer that a rule gives."""
    answers = set()
    for rule in policy.rules:
        if rule.syscall == name and all(
            arguments[condition.argument] & condition.mask == condition.value for condition in rule.conditions
        ):
            answers.add(bpf.RET_ALLOW if rule.answer == ALLOWED else bpf.RET_ERRNO | rule.answer)
    return answers or {default}


# ---------------------------------------------------------------- language


def test_statements() -> None:
    policy = _parse(
        """
        define TWO 0x2          # a comment
        define FOUR 4
        allow read write
        allow ioctl if arg1:32 == TWO
        allow ioctl if arg1 == TWO|FOUR and arg2 lacks FOUR
        refuse EACCES open
        refuse ENOSYS stat if arg0 == 1
        pretend sched_setscheduler
        allow tgkill if arg0:32 == OWN_PROCESS and arg2:32 == TWO
        allow fcntl if arg1:32 in {TWO, FOUR} and arg2 & 0x800 == 0x800
        allow futex if arg1:32 only TWO|FOUR
        elsewhere mmap if arg3 only FOUR
        """
    )
    assert policy.elsewhere == policy.rules[-1:]
    assert policy.rules == (
        Rule("read", ALLOWED, ()),
        Rule("write", ALLOWED, ()),
        Rule("ioctl", ALLOWED, (Condition(1, 0xFFFFFFFF, 2),)),
        Rule("ioctl", ALLOWED, (Condition(1, (1 << 64) - 1, 6), Condition(2, 4, 0))),
        Rule("open", errno.EACCES, ()),
        Rule("stat", errno.ENOSYS, (Condition(0, (1 << 64) - 1, 1),)),
        Rule("sched_setscheduler", 0, ()),
        Rule("tgkill", ALLOWED, (Condition(0, 0xFFFFFFFF, OWN_PROCESS), Condition(2, 0xFFFFFFFF, 2))),
        Rule("fcntl", ALLOWED, (Condition(1, 0xFFFFFFFF, 2), Condition(2, 0x800, 0x800))),
        Rule("fcntl", ALLOWED, (Condition(1, 0xFFFFFFFF, 4), Condition(2, 0x800, 0x800))),
        Rule("futex", ALLOWED, (Condition(1, 0xFFFFFFF9, 0),)),
        Rule("mmap", ALLOWED, (Condition(3, 0xFFFFFFFFFFFFFFFB, 0),)),
    )


@pytest.mark.parametrize(
    "line",
    [
        "permit read",
        "allow",
        "refuse read",
        "refuse ENONSENSE read",
        "refuse EACCES",
        "define X",
        "define X y",
        "allow read write if arg0 == 1",
        "allow read if",
        "allow read if arg6 == 1",
        "allow read if arg0:64 == 1",
        "allow read if arg0 < 1",
        "allow read if arg0 == UNDEFINED",
        "allow read if arg0 == 1 and",
        "allow read if arg0 == 1 or arg1 == 1",
        "allow tgkill if arg0 == OWN_PROCESS",
        "allow tgkill if arg0:32 lacks OWN_PROCESS",
        "allow tgkill if arg0 lacks OWN_PROCESS",
        "allow tgkill if arg0:32 == OWN_PROCESS|1",
        f"allow tgkill if arg0:32 == {OWN_PROCESS}",
        "define OWN_PROCESS 1",
        "include main",
        "allow tgkill if arg0:32 in {OWN_PROCESS}",
        "allow tgkill if arg0 & OWN_PROCESS == 0",
        "allow tgkill if arg0:32 only OWN_PROCESS",
        "allow read if arg0 in {}",
        "allow read if arg0 in {1",
        "allow read if arg0 in 1",
        "allow read if arg0 & 1",
        "allow read if arg0:32 & 1 == 1",
        "allow read if arg0 & 1 == 2",
        "allow read if arg0 & 1 is 1",
        "allow read if arg0 == 1 and arg0 == 2",
        "first read",
        "first ioctl if arg1 == 1",
        "first ioctl if arg1:32 == 1 and arg0:32 == 1",
    ],
)
def test_mistakes_name_the_line(line: str) -> None:
    with pytest.raises(PolicyError, match=r"line 2|includes itself"):
        _parse(f"allow close\n{line}\n")


@pytest.mark.parametrize(
    "text",
    [
        "allow read\nrefuse EACCES read",
        "refuse EPERM read\nrefuse EACCES read",
        "allow read\nrefuse EPERM read if arg0 == 1",
    ],
)
def test_contradictions_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="read"):
        _parse(text)


def test_an_allowed_call_overrides_an_included_refusal() -> None:
    policy = _parse("include other\nallow openat", other="refuse EACCES openat open\nrefuse EACCES stat if arg0 == 1")
    assert {(rule.syscall, rule.answer) for rule in policy.rules} == {
        ("openat", ALLOWED),
        ("open", errno.EACCES),
        ("stat", errno.EACCES),
    }


def test_a_rule_that_an_unconditional_one_covers_is_dropped() -> None:
    policy = _parse("include other\nallow ioctl", other="allow ioctl if arg1 == 1")
    assert policy.rules == (Rule("ioctl", ALLOWED, ()),)


def test_missing_policy() -> None:
    with pytest.raises(PolicyError, match="nonsense"):
        read_text("nonsense")


@given(st.text(alphabet="abcdefinlowuse \n#=:|0x19_ERMargX", max_size=200))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        _parse(text, a="", b="")
    except (PolicyError, KeyError):  # KeyError: the reader of this test, for a file that does not exist
        pass


# ---------------------------------------------------------------- compiled filters


@pytest.fixture(scope="module", params=ROLES)
def compiled(request: pytest.FixtureRequest) -> tuple[Policy, bytes]:
    policy = parse(request.param)
    return policy, install.with_default(compile_policy(policy)[0], bpf.RET_KILL_PROCESS)


def test_every_call_without_arguments(compiled: tuple[Policy, bytes]) -> None:
    policy, program = compiled
    for number, name in SYSCALL_NAMES.items():
        expected = _meaning(policy, name, (0,) * 6, bpf.RET_KILL_PROCESS)
        assert bpf.evaluate(program, number) in expected, name


def test_every_rule_with_good_and_bad_arguments(compiled: tuple[Policy, bytes]) -> None:
    policy, program = compiled
    for rule in policy.rules:
        for bad in (None, *rule.conditions):
            arguments = [0] * 6
            for condition in rule.conditions:
                # Bits outside the mask must not matter: set them all.
                arguments[condition.argument] |= condition.value | ~condition.mask & (1 << 64) - 1
            if bad is not None:
                arguments[bad.argument] ^= bad.mask & -bad.mask  # the lowest bit that matters
            expected = _meaning(policy, rule.syscall, tuple(arguments), bpf.RET_KILL_PROCESS)
            assert bpf.evaluate(program, NUMBERS[rule.syscall], tuple(arguments)) in expected, (rule, bad)


@given(data=st.data())
def test_any_call(compiled: tuple[Policy, bytes], data: st.DataObject) -> None:
    policy, program = compiled
    interesting = sorted({condition.value for rule in policy.rules for condition in rule.conditions})
    argument = st.one_of(st.sampled_from([0, 1, *interesting]), st.integers(0, (1 << 64) - 1))
    number = data.draw(st.integers(0, max(SYSCALL_NAMES) + 10))
    arguments = tuple(data.draw(st.lists(argument, min_size=6, max_size=6)))
    expected = _meaning(policy, SYSCALL_NAMES.get(number, ""), arguments, bpf.RET_KILL_PROCESS)
    assert bpf.evaluate(program, number, arguments) in expected


def test_other_architectures_end_the_process(compiled: tuple[Policy, bytes]) -> None:
    _, program = compiled
    assert bpf.evaluate(program, NUMBERS["read"], arch=bpf.ARCH_I386) == bpf.RET_KILL_PROCESS
    assert bpf.evaluate(program, NUMBERS["read"] | X32_BIT) == bpf.RET_KILL_PROCESS
    assert bpf.evaluate(program, NUMBERS["read"]) == bpf.RET_ALLOW


def test_what_no_role_may_ever_do() -> None:
    forbidden = (
        "execve execveat ptrace mount pivot_root unshare setns setuid setreuid bpf chroot mknod mknodat reboot "
        "process_vm_readv process_vm_writev init_module kexec_load keyctl add_key userfaultfd "
        "perf_event_open open_by_handle_at memfd_secret"
    ).split()
    for role in ("supervisor", "vmm", "vcpu"):
        program = install.with_default(compile_policy(parse(role))[0], bpf.RET_KILL_PROCESS)
        for name in forbidden:
            assert bpf.evaluate(program, NUMBERS[name]) == bpf.RET_KILL_PROCESS, (role, name)


def test_what_only_the_supervisor_may_do() -> None:
    fork = 0x01200011
    new_namespace = fork | 0x20000000
    for role, verdict in (("supervisor", bpf.RET_ALLOW), ("vmm", bpf.RET_KILL_PROCESS), ("vcpu", bpf.RET_KILL_PROCESS)):
        program = install.with_default(compile_policy(parse(role))[0], bpf.RET_KILL_PROCESS)
        assert bpf.evaluate(program, NUMBERS["clone"], (fork,)) == verdict, role
        assert bpf.evaluate(program, NUMBERS["clone"], (new_namespace,)) == bpf.RET_KILL_PROCESS, role
        kill = (0, 9)
        assert bpf.evaluate(program, NUMBERS["kill"], kill) == bpf.RET_KILL_PROCESS, role


# ---------------------------------------------------------------- the own process

PID = 4321


def _verdict(role: str, call: str, *arguments: int, variant: str = "") -> int:
    """Return what the installed filter of a process with the id PID says."""
    chosen = install.load((role,), "kill", variant).filters[role]
    return bpf.evaluate(install.for_process(chosen, PID), NUMBERS[call], arguments)


def test_workers_signal_nobody_but_themselves() -> None:
    # The kernel takes the low 32 bits of all three arguments.
    for own in (PID, PID | 1 << 32, PID | 0xFFFFFFFF << 32):
        assert _verdict("vcpu", "tgkill", own, 99, 34) == bpf.RET_ALLOW
        for number in (0, 6, 9, 19, 33, 35):
            assert _verdict("vcpu", "tgkill", own, 99, number) == bpf.RET_KILL_PROCESS, number
    for other in (0, 1, PID - 1, PID + 1, PID << 8, PID << 32, 0xFFFFFFFF, -PID & 0xFFFFFFFF, OWN_PROCESS):
        assert _verdict("vcpu", "tgkill", other, PID, 34) == bpf.RET_KILL_PROCESS, other
    for call in ("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pidfd_open"):
        assert _verdict("vcpu", call, PID, 34, 34) == bpf.RET_KILL_PROCESS, call


def test_the_controller_signals_by_pidfd_only() -> None:
    for call in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open"):
        for number in (9, 34):
            assert _verdict("vmm", call, PID, number, number) == bpf.RET_KILL_PROCESS, call


def test_a_filter_that_was_not_made_for_a_process_lets_nobody_be_signalled() -> None:
    program = install.load(("vcpu",), "kill").filters["vcpu"].program
    assert OWN_PROCESS > 1 << 22  # PID_MAX_LIMIT: no process has this id
    for pid in (1, PID, 1 << 22):
        assert bpf.evaluate(program, NUMBERS["tgkill"], (pid, pid, 34)) == bpf.RET_KILL_PROCESS


def test_nothing_but_the_process_id_differs() -> None:
    for role in ("supervisor", "vmm", "vcpu"):
        for variant in ("", "-faults"):
            chosen = install.load((role,), "kill", variant).filters[role]
            program = install.for_process(chosen, PID)
            assert len(program) == len(chosen.program)
            different = {
                offset // 8
                for offset, pair in enumerate(zip(program, chosen.program, strict=True))
                if pair[0] != pair[1]
            }
            assert different == {place // 8 for place in chosen.own_process}
            assert bool(different) == ((role, variant) in {("vcpu", ""), ("vcpu", "-faults"), ("vmm", "-faults")})


def test_of_the_supervisors_filter_the_users_of_its_cells_differ_as_well() -> None:
    chosen = install.load(("supervisor",), "kill").filters["supervisor"]
    assert chosen.cell_users
    program = install.for_process(chosen, PID, 0x78000180)
    uids = (0x78000180, 0x780001FF, 0x7800018A)
    for call in ("setresuid", "setresgid"):
        assert bpf.evaluate(program, NUMBERS[call], uids) == bpf.RET_ALLOW
        for uid in (0, 0x7800017F, 0x78000200, install.CELL_USERS):
            assert bpf.evaluate(program, NUMBERS[call], (uid,) * 3) == bpf.RET_KILL_PROCESS


def test_workers_reach_no_file_and_make_no_socket() -> None:
    program = install.with_default(compile_policy(parse("vcpu"))[0], bpf.RET_KILL_PROCESS)
    denied = bpf.RET_ERRNO | errno.EACCES
    for name in ("open", "openat", "openat2", "creat", "stat", "lstat", "access", "readlink", "getcwd", "newfstatat"):
        assert bpf.evaluate(program, NUMBERS[name]) == denied, name
    for name in "socket connect bind accept4 memfd_create unlink rename pidfd_send_signal dup".split():
        assert bpf.evaluate(program, NUMBERS[name], (1, 9)) == bpf.RET_KILL_PROCESS, name
    for protection, verdict in ((3, bpf.RET_ALLOW), (7, bpf.RET_KILL_PROCESS), (4, bpf.RET_KILL_PROCESS)):
        for name in ("mmap", "mprotect"):
            assert bpf.evaluate(program, NUMBERS[name], (0, 4096, protection, 0x22)) == verdict, (name, protection)


def test_the_hot_call_is_looked_at_first() -> None:
    program = install.with_default(compile_policy(parse("vcpu"))[0], bpf.RET_KILL_PROCESS)
    shortcut = program[: 7 * 8]
    assert bpf.evaluate(shortcut, NUMBERS["ioctl"], (5, 0xFFFFFFFF0000AE80)) == bpf.RET_ALLOW
    assert parse("supervisor").first == parse("vcpu").first != ()


def test_a_code_of_ioctl_is_compared_in_32_bits() -> None:
    """ctypes and fcntl may sign-extend a code above 0x80000000."""
    program = install.with_default(compile_policy(parse("vcpu"))[0], bpf.RET_KILL_PROCESS)
    for code in (0x8090AE81, 0xFFFFFFFF8090AE81):
        assert bpf.evaluate(program, NUMBERS["ioctl"], (5, code)) == bpf.RET_ALLOW
    assert bpf.evaluate(program, NUMBERS["ioctl"], (5, 0xAE01)) == bpf.RET_KILL_PROCESS  # KVM_CREATE_VM


# ---------------------------------------------------------------- modes, files


def test_modes_differ_in_the_default_only() -> None:
    kill = install.load(("supervisor", "vmm", "vcpu"), "kill").filters
    report = install.load(("supervisor", "vmm", "vcpu"), "report").filters
    ptrace = NUMBERS["ptrace"]
    assert {bpf.evaluate(kill[role].program, ptrace) for role in kill} == {bpf.RET_KILL_PROCESS}
    assert bpf.evaluate(report["vmm"].program, ptrace) == bpf.RET_USER_NOTIF
    assert bpf.evaluate(report["vcpu"].program, ptrace) == bpf.RET_USER_NOTIF
    # Nothing that a worker's filter reports may be pre-empted by the supervisor's, which the worker inherits.
    assert bpf.evaluate(report["supervisor"].program, ptrace) == bpf.RET_LOG
    assert kill["vcpu"].digest == sha256(kill["vcpu"].program).hex() != report["vcpu"].digest
    with pytest.raises(PolicyError, match="nonsense"):
        install.load(("vcpu",), "nonsense")


def test_supervisor_allows_what_workers_are_allowed() -> None:
    """Filters are inherited: a worker can do only what both allow."""
    supervisor = install.load(("supervisor",), "kill").filters["supervisor"].program
    for rule in parse("vcpu").rules:
        if rule.answer != ALLOWED:
            continue
        arguments = [0] * 6
        for condition in rule.conditions:
            arguments[condition.argument] |= condition.value
        assert bpf.evaluate(supervisor, NUMBERS[rule.syscall], tuple(arguments)) == bpf.RET_ALLOW, rule


def test_variant_for_armed_faults() -> None:
    for role in ("vmm", "vcpu"):
        assert _verdict(role, "kill", PID, 9, variant="-faults") == bpf.RET_ALLOW
        assert _verdict(role, "kill", PID, 15, variant="-faults") == bpf.RET_KILL_PROCESS
        assert _verdict(role, "kill", PID + 1, 9, variant="-faults") == bpf.RET_KILL_PROCESS
    assert _verdict("janitor", "kill", PID, 9, variant="-faults") == bpf.RET_KILL_PROCESS


def test_missing_filter_is_compiled_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(install, "_ready", {})  # an earlier test may have loaded it
    monkeypatch.setattr(install, "compiled_path", lambda role, key: f"{tmp_path}/{role}")
    loaded = install.load(("janitor",), "kill")
    assert "./dev setup" in loaded.warning
    assert loaded.filters == install.load(("janitor",), "kill").filters


def test_file_format() -> None:
    key = cache_key("text")
    program = struct.pack("<HBBI", 6, 0, 0, bpf.RET_ALLOW)
    content = pack(key, "2.5.4", program)
    assert unpack(content, key) == ("2.5.4", program)
    for damaged in (b"", content[:-1], content + b"\0", content[:50], b"X" + content[1:]):
        with pytest.raises(PolicyError):
            unpack(damaged, key)
    with pytest.raises(PolicyError):
        unpack(content, cache_key("other text"))


@given(st.binary(max_size=100))
def test_any_file_is_read_or_refused(content: bytes) -> None:
    try:
        unpack(content, cache_key("text"))
    except PolicyError:
        pass


def test_key_covers_included_files() -> None:
    text = full_text("supervisor")
    for role in ("supervisor", "vcpu", "common"):
        assert read_text(role) in text


def test_every_name_in_the_policies_exists() -> None:
    for role in ROLES:
        unknown = {rule.syscall for rule in parse(role).rules} - set(NUMBERS)
        assert not unknown, role


def test_description_of_a_forbidden_call() -> None:
    call = notification.ForbiddenCall(7, NUMBERS["openat"], (1, 0x7F0000000000, 2, 0, 0, 0))
    text = notification.describe(call)
    assert re.fullmatch(r"forbidden system call openat\(1, 0x7f0000000000, 2, 0, 0, 0\) in thread 7", text)
    assert "system call 9999(" in notification.describe(call._replace(number=9999))


def test_ioctl_codes_of_workers_are_the_documented_ones() -> None:
    """docs/seccomp.md is made from a trace of real workers."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "seccomp.md").read_text()
    documented = {int(code, 16) for code in re.findall(r"\bKVM_\w+ (0x[0-9A-F]+)", page.partition("## ioctl")[2])}
    allowed = {
        condition.value for rule in parse("vcpu").rules if rule.syscall == "ioctl" for condition in rule.conditions
    }
    assert allowed == documented


def test_workers_cannot_make_a_shared_open_file_blocking() -> None:
    fionbio, fioasync, f_setfl = 0x5421, 0x5452, 4
    for code in (fionbio, fioasync, fionbio | 0xFFFFFFFF << 32):
        assert _verdict("vcpu", "ioctl", 5, code) == bpf.RET_KILL_PROCESS
    assert _verdict("vcpu", "fcntl", 5, f_setfl) == bpf.RET_KILL_PROCESS
