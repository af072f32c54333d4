"""``./dev policies record``: what the cells ask of the kernel while a command runs, next to what their policies allow.

The kernel's tracing tells each system call with its arguments (tracefs, raw_syscalls:sys_enter), of the command and all
that it starts: nothing of this is in a cell, and the cells run as they are shipped. Root only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from devtool.project import PYTHON, DevError, say
from jailer.seccomp.names import SYSCALL_NAMES
from jailer.seccomp.policy import ALLOWED, OWN_PROCESS, Policy, Rule, parse

#: Policies whose rules are counted; a cell's running stage is subject to both of its filters.
POLICIES = ("vcpu-setup", "vcpu", "device-setup", "device", "vmm-setup", "vmm")
_SECCOMP = "seccomp"
_MOUNTED = Path("/sys/kernel/tracing")
_BUFFER_KIB = 64 << 10
#: "comm-TID ( TGID) [CPU] flags time: sys_enter: NR n (a, b, c, d, e, f)"
_LINE = re.compile(r"^\s*(.+)-(\d+)\s+\(\s*(\d+|-+)\) .*: sys_enter: NR (-?\d+) \(([^)]*)\)")
_ROLE = re.compile(r"^(vmm|vcpu|device) ?\d*$")
#: So many values of an argument are told one by one.
_MAX_VALUES = 12
_PAUSE_S = 0.05


class Call(NamedTuple):
    """A system call as the kernel saw it; ``process`` is the thread group."""

    name: str
    thread: int
    process: int
    number: int
    arguments: tuple[int, ...]


def parse_line(line: str) -> Call | None:
    """Read one line of trace_pipe; None if it is none of a system call whose process is known."""
    match = _LINE.match(line)
    if match is None or not match[3].isdecimal():
        return None
    arguments = tuple(int(each, 16) for each in match[5].split(", "))
    return Call(match[1], int(match[2]), int(match[3]), int(match[4]), arguments)


class Recorder:
    """Sorts calls by policy, and counts which rule allows each of them."""

    def __init__(self, policies: Sequence[str] = POLICIES) -> None:
        self._policies: dict[str, Policy] = {name: parse(name) for name in policies}
        self._rules: dict[str, dict[str, list[Rule]]] = {}
        for name, policy in self._policies.items():
            rules = self._rules[name] = {}
            for rule in policy.rules:
                rules.setdefault(rule.syscall, []).append(rule)
        #: Process → its role and how many filters of its own it has.
        self._cells: dict[int, tuple[str, int]] = {}
        self.used: dict[str, set[Rule]] = {name: set() for name in policies}
        #: What no rule allows. (A filter stops a call before it is traced.)
        self.refused: dict[str, set[str]] = {name: set() for name in policies}
        self.seen: dict[str, dict[str, list[set[int]]]] = {name: {} for name in policies}

    def add(self, call: Call) -> None:
        """Take a call into account, in the order in which they were made."""
        name = SYSCALL_NAMES.get(call.number, str(call.number))
        role, filters = self._cells.get(call.process, ("", 0))
        if role:
            for policy in (f"{role}-setup", role)[:filters]:
                self._count(policy, name, call)
        match = _ROLE.match(call.name)
        if name == _SECCOMP and call.thread == call.process and match is not None and filters < 2:
            self._cells[call.process] = (match[1], filters + 1)
        elif name == "exit_group":
            self._cells.pop(call.process, None)  # its number may be another process's soon

    def _count(self, policy: str, name: str, call: Call) -> None:
        for rule in self._rules[policy].get(name, ()):
            if all(
                call.arguments[each.argument] & each.mask == each.value or each.value == OWN_PROCESS
                for each in rule.conditions
            ):
                self.used[policy].add(rule)
                if rule.answer == ALLOWED:
                    values = self.seen[policy].setdefault(name, [set() for _ in range(6)])
                    for value, known in zip(call.arguments, values, strict=True):
                        if len(known) <= _MAX_VALUES:
                            known.add(value)
                return
        self.refused[policy].add(f"{name}({', '.join(map(hex, call.arguments))})")

    def unused(self, policy: str) -> list[Rule]:
        """Return the allowing rules that no call needed, but for those that the text declares to be for others."""
        parsed = self._policies[policy]
        return [
            rule
            for rule in parsed.rules
            if rule.answer == ALLOWED and rule not in self.used[policy] and rule not in parsed.elsewhere
        ]

    def report(self) -> Iterator[str]:
        """Say for each policy what was used, as policy text, and what was not."""
        for name, policy in self._policies.items():
            yield f"==== {name}.policy: what was used"
            for rule in policy.rules:
                if rule in self.used[name]:
                    yield text_of(rule)
            yield f"---- {name}.policy: arguments that were seen"
            for call, values in sorted(self.seen[name].items()):
                told = [
                    f"arg{index} in {{{', '.join(map(hex, sorted(each)))}}}"
                    for index, each in enumerate(values)
                    if len(each) <= _MAX_VALUES
                ]
                yield f"# {call}: {'; '.join(told)}"
            yield f"---- {name}.policy: rules that were not used"
            yield from map(text_of, self.unused(name))
            yield f"---- {name}.policy: rules for other kernels and C libraries, not used here"
            yield from (text_of(rule) for rule in policy.elsewhere if rule not in self.used[name])
            yield f"---- {name}.policy: calls that no rule allows, and no filter was there to stop"
            yield from sorted(self.refused[name])[:40]


def text_of(rule: Rule) -> str:
    """Return a rule in the language of the policies."""
    words = ["allow" if rule.answer == ALLOWED else f"answer {rule.answer}", rule.syscall]
    for index, condition in enumerate(rule.conditions):
        words.append("and" if index else "if")
        if condition.value == OWN_PROCESS:
            words.append(f"arg{condition.argument}:32 == OWN_PROCESS")
        elif condition.mask == 0xFFFFFFFF:
            words.append(f"arg{condition.argument}:32 == {condition.value:#x}")
        elif condition.mask == (1 << 64) - 1:
            words.append(f"arg{condition.argument} == {condition.value:#x}")
        else:
            words.append(f"arg{condition.argument} & {condition.mask:#x} == {condition.value:#x}")
    return " ".join(words)


@contextlib.contextmanager
def tracefs() -> Iterator[Path]:
    """Yield where tracefs is mounted; where it is not, it is for as long as this lasts. Raises DevError."""
    if (_MOUNTED / "instances").is_dir():
        yield _MOUNTED
        return
    with tempfile.TemporaryDirectory(prefix="cellblock-trace-") as directory:
        if subprocess.run(["mount", "-t", "tracefs", "none", directory], check=False).returncode:
            raise DevError("recording needs root and a kernel with tracefs")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=False)


@contextlib.contextmanager
def _instance(root: Path) -> Iterator[Path]:
    instance = root / "instances" / f"cellblock-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "buffer_size_kb").write_text(str(_BUFFER_KIB))
        (root / "saved_cmdlines_size").write_text("8192")
        for option in ("record-tgid", "event-fork"):
            (instance / "options" / option).write_text("1")
        yield instance
    finally:
        instance.rmdir()


def record(command: Sequence[str]) -> tuple[Recorder, int, int]:
    """Run a command; return what its cells did, its exit status, and how many calls the kernel has lost."""
    recorder = Recorder()
    with tracefs() as root, _instance(root) as instance:
        pipe = os.open(instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        over = threading.Event()
        # Stopped until it is followed.
        child = subprocess.Popen(["sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *command])
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        (instance / "set_event_pid").write_text(str(child.pid))
        (instance / "events/raw_syscalls/sys_enter/enable").write_text("1")
        reader = threading.Thread(target=_read, args=(pipe, recorder, over))
        reader.start()
        os.kill(child.pid, signal.SIGCONT)
        status = child.wait()
        (instance / "events/raw_syscalls/sys_enter/enable").write_text("0")
        over.set()
        reader.join()
        os.close(pipe)
        stats = [each.read_text() for each in instance.glob("per_cpu/cpu*/stats")]
        lost = sum(int(number) for text in stats for number in re.findall(r"^overrun: (\d+)", text, re.MULTILINE))
    return recorder, status, lost


def _read(pipe: int, recorder: Recorder, over: threading.Event) -> None:
    """Read until everything was read and nothing more comes."""
    rest = b""
    while True:
        last = over.is_set()
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            data = b""
        if not data:
            if last:
                return
            over.wait(_PAUSE_S)
            continue
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            call = parse_line(line.decode(errors="replace"))
            if call is not None:
                recorder.add(call)


def main(arguments: Sequence[str]) -> int:
    """``record [PYTEST-ARGUMENTS]``: the tests, by default those of the jail and of KVM."""
    if arguments[:1] != ["record"]:
        raise DevError("expected: ./dev policies record [PYTEST-ARGUMENTS]")
    tests = list(arguments[1:]) or ["tests/jail", "tests/kvm"]
    recorder, status, lost = record([str(PYTHON), "-m", "pytest", "-q", *tests])
    for line in recorder.report():
        print(line)
    if lost:
        say(f"{lost} calls were lost: the kernel's buffer was full")
    unused = sum(len(recorder.unused(policy)) for policy in POLICIES)
    say(f"{unused} rules were not used; the tests ended with {status}")
    return 1 if status or unused else 0
