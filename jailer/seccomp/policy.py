"""The policy language: one file per role, one rule per line, read without any library.

Lines (``#`` starts a comment; leading blanks do not matter)::

    define NAME NUMBER                     give a number a name (decimal or 0x…)
    include ROLE                           take over every rule of another policy file
    allow SYSCALL…                         the calls are allowed
    allow SYSCALL if COND [and COND…]      the call is allowed if all conditions hold; several lines are alternatives
    first SYSCALL if argN:32 == VALUE      allowed, and looked at before everything else (for the hot path)
    elsewhere …                            as "allow …", for kernels and C libraries that the tests do not run on: the
                                           recorder does not miss it
    refuse ERRNO SYSCALL…                  the calls fail with this errno and do nothing
    refuse ERRNO SYSCALL if COND…          the call fails so if all conditions hold
    pretend SYSCALL…                       the calls do nothing and report success

    COND: argN == VALUE                    64-bit comparison of argument N (0…5)
          argN:32 == VALUE                 comparison of its low 32 bits (all that the kernel looks at in ioctl codes)
          argN & MASK == VALUE             comparison of these bits
          argN lacks VALUE                 none of these bits is set
          argN only VALUE                  no other bits are set (argN:32: among the low 32)
          argN in {VALUE, VALUE…}          it is one of them: a rule for each (also argN:32)
          argN:32 == OWN_PROCESS           it is the process that the filter is installed in (its thread-group id, as
                                           its own pid namespace counts)

What no rule allows or refuses ends the process. A call that a file allows overrides an included refusal.
"""

from __future__ import annotations

import errno
import os

from base.errno_text import errno_text
from base.lean_typing import Callable, NamedTuple
from jailer.errors import PolicyError

#: Where the policies lie.
DIRECTORY = os.path.dirname(os.path.abspath(__file__))
_MAX_LINES = 2000
_LOW_32 = 0xFFFFFFFF
_ALL_64 = (1 << 64) - 1
#: Stands for the own process id in a compiled filter until it is installed. No process ever has it (PID_MAX_LIMIT is
#: 2**22), so that a filter in which it was left allows nothing that it should not.
OWN_PROCESS = 0x4F574E50
_OWN_PROCESS_NAME = "OWN_PROCESS"


class Condition(NamedTuple):
    """``argument & mask == value``."""

    argument: int
    mask: int
    value: int


#: ``Rule.answer`` of an allowed call.
ALLOWED = -1


class Rule(NamedTuple):
    """One alternative for one system call; ``answer`` is ALLOWED, or the errno to fail with (0: pretend success)."""

    syscall: str
    answer: int
    conditions: tuple[Condition, ...]


class Policy(NamedTuple):
    """The rules of a role in the order of the text, and all the text that they came from (for the cache key).

    ``first`` are those of the rules that are to be looked at before the others, ``elsewhere`` those that only other
    kernels or C libraries need.
    """

    role: str
    rules: tuple[Rule, ...]
    text: str
    first: tuple[Rule, ...]
    elsewhere: tuple[Rule, ...]


def read_text(role: str) -> str:
    """Return the text of a role's policy file. Raises PolicyError."""
    try:
        with open(os.path.join(DIRECTORY, f"{role}.policy"), encoding="ascii") as file:
            return file.read()
    except OSError as error:
        raise PolicyError(f"cannot read the seccomp policy of {role!r}: {errno_text(error)}") from None
    except UnicodeDecodeError as error:
        raise PolicyError(f"cannot read the seccomp policy of {role!r}: {error}") from None


def full_text(role: str, reader: Callable[[str], str] = read_text) -> str:
    """Return the text of a policy and of everything that it includes, without parsing the rules. Raises PolicyError."""
    texts: list[str] = []
    pending = [role]
    seen: set[str] = set()
    while pending:
        name = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        text = reader(name)
        texts.append(f"# {name}.policy\n{text}")
        words = [line.split("#", 1)[0].split() for line in text.splitlines()]
        pending.extend(line[-1] for line in words if line[:1] == ["include"])
    return "".join(texts)


def parse(role: str, reader: Callable[[str], str] = read_text) -> Policy:
    """Parse a role's policy with its includes. Raises PolicyError that names file and line."""
    parser = _Parser(reader)
    rules = parser.file(role, ())
    return Policy(role, tuple(_merge(rules)), full_text(role, reader), tuple(parser.first), tuple(parser.elsewhere))


def _words(line: str) -> list[str]:
    """Return the words of a line without its comment; braces stand alone, commas only separate."""
    code = line.split("#", 1)[0]
    return code.replace("{", " { ").replace("}", " } ").replace(",", " ").split()


class _Parser:
    def __init__(self, reader: Callable[[str], str]) -> None:
        self._reader = reader
        self._names: dict[str, int] = {}
        self.first: list[Rule] = []
        self.elsewhere: list[Rule] = []

    def file(self, role: str, stack: tuple[str, ...]) -> list[Rule]:
        if role in stack:
            raise PolicyError(f"seccomp policy {role!r} includes itself")
        own: list[Rule] = []
        included: list[Rule] = []
        lines = self._reader(role).splitlines()
        if len(lines) > _MAX_LINES:
            raise PolicyError(f"seccomp policy {role!r} has more than {_MAX_LINES} lines")
        for number, line in enumerate(lines, 1):
            words = _words(line)
            if not words:
                continue
            try:
                self._line(words, own, included, (*stack, role))
            except (ValueError, KeyError, IndexError) as error:
                raise PolicyError(f"{role}.policy line {number}: {line.strip()!r}: {error}") from None
        allowed = {rule.syscall for rule in own}
        return own + [rule for rule in included if rule.answer == ALLOWED or rule.syscall not in allowed]

    def _line(self, words: list[str], own: list[Rule], included: list[Rule], stack: tuple[str, ...]) -> None:
        verb = words[0]
        if verb == "define":
            _, name, value = words
            if name == _OWN_PROCESS_NAME:
                raise ValueError(f"{name} has its meaning already")
            self._names[name] = int(value, 0)
        elif verb == "include":
            _, role = words
            included.extend(self.file(role, stack))
        elif verb == "refuse":
            number = getattr(errno, words[1], None)
            if not isinstance(number, int):
                raise ValueError("expected: refuse ERRNO SYSCALL…")
            own.extend(self._rules(words[2:], number))
        elif verb == "allow":
            own.extend(self._rules(words[1:], ALLOWED))
        elif verb == "elsewhere":
            rules = self._rules(words[1:], ALLOWED)
            own.extend(rules)
            self.elsewhere.extend(rules)
        elif verb == "first":
            (rule,) = self._rules(words[1:], ALLOWED)
            if len(rule.conditions) != 1 or rule.conditions[0].mask != _LOW_32:
                raise ValueError("expected: first SYSCALL if argN:32 == VALUE")
            own.append(rule)
            self.first.append(rule)
        elif verb == "pretend":
            own.extend(self._rules(words[1:], 0))
        else:
            raise ValueError("unknown statement")

    def _rules(self, words: list[str], answer: int) -> list[Rule]:
        if "if" in words:
            if words.index("if") != 1:
                raise ValueError("conditions belong to exactly one system call")
            return [Rule(words[0], answer, conditions) for conditions in self._alternatives(words[2:])]
        if not words:
            raise ValueError("no system call")
        return [Rule(name, answer, ()) for name in words]

    def _alternatives(self, words: list[str]) -> list[tuple[Condition, ...]]:
        """Return the conditions after ``if``; several lists of them where one says ``in``."""
        alternatives: list[tuple[Condition, ...]] = [()]
        arguments: set[str] = set()
        while True:
            argument, *words = words
            name, _, width = argument.partition(":")
            if name not in ("arg0", "arg1", "arg2", "arg3", "arg4", "arg5") or width not in ("", "32"):
                raise ValueError(f"expected argN or argN:32, not {argument!r}")
            if name in arguments:
                raise ValueError(f"two conditions on {name}: a rule can have one on each argument")
            arguments.add(name)
            number = int(name[3:])
            choices, words = self._comparison(words, _LOW_32 if width else _ALL_64)
            alternatives = [
                (*before, Condition(number, mask, value)) for before in alternatives for mask, value in choices
            ]
            if not words:
                return alternatives
            if words.pop(0) != "and" or not words:
                raise ValueError("expected 'and' between conditions")

    def _comparison(self, words: list[str], width: int) -> tuple[list[tuple[int, int]], list[str]]:
        """Return the alternatives (mask, value) of one comparison, and the words after it."""
        operator, value, *rest = words
        if value == _OWN_PROCESS_NAME and operator == "==" and width == _LOW_32:
            return [(width, OWN_PROCESS)], rest
        if operator == "==":
            return [(width, self._number(value) & width)], rest
        if operator == "lacks":
            return [(self._number(value), 0)], rest
        if operator == "only":
            return [(~self._number(value) & width, 0)], rest
        if operator == "&" and width == _ALL_64 and rest[0] == "==":
            mask, wanted = self._number(value), self._number(rest[1])
            if wanted & ~mask:
                raise ValueError("the value has bits that the mask lacks")
            return [(mask, wanted)], rest[2:]
        if operator == "in" and value == "{" and "}" in rest[1:]:
            end = rest.index("}")
            return [(width, self._number(each) & width) for each in rest[:end]], rest[end + 1 :]
        raise ValueError(f"unknown comparison {operator!r}")

    def _number(self, word: str) -> int:
        """Return the value of ``NAME|NAME|0x10``."""
        if word == _OWN_PROCESS_NAME:
            raise ValueError(f"expected: argN:32 == {_OWN_PROCESS_NAME}")
        value = 0
        for part in word.split("|"):
            if part in self._names:
                value |= self._names[part]
            elif part[:1].isdigit():
                value |= int(part, 0)
            else:
                raise KeyError(f"{part!r} is not defined")
        if value == OWN_PROCESS:
            raise ValueError(f"the number {value:#x} stands for {_OWN_PROCESS_NAME}")
        return value


def _merge(rules: list[Rule]) -> list[Rule]:
    """Drop what an unconditional rule of the same call makes superfluous. Raises PolicyError on a contradiction."""
    unconditional: dict[str, int] = {}
    for rule in rules:
        if not rule.conditions and unconditional.setdefault(rule.syscall, rule.answer) != rule.answer:
            raise PolicyError(f"system call {rule.syscall} is both allowed and refused, or refused with two errors")
    merged: dict[Rule, None] = {}
    for rule in rules:
        if rule.conditions and rule.syscall in unconditional:
            if rule.answer != unconditional[rule.syscall]:
                raise PolicyError(f"system call {rule.syscall} has a condition that an unconditional rule contradicts")
            continue
        merged[rule] = None
    return list(merged)
