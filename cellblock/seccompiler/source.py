"""Firecracker's JSON of seccomp filters: a filter for each thread, rules by system call and by arguments.

    {"THREAD": {"default_action": A, "filter_action": A, "filter": [{"syscall": S, "comment"?: …, "args"?: [
        {"index": 0…5, "type": "dword" | "qword", "op": O, "val": 64 bits, "comment"?: …}]}]}}

A is "allow", "kill_thread", "kill_process", "log", "trap", {"errno": N} or {"trace": N}; O is "eq", "ne", "lt", "le",
"gt", "ge" or {"masked_eq": MASK}.
"""

from __future__ import annotations

from base.lean_typing import Any, NamedTuple, NoReturn
from cellblock.seccompiler.errors import CompilerError
from vmm.json.decoder import JsonError
from vmm.json.decoder import decode as decode_json

MAX_INDEX = 5
_U16 = (1 << 16) - 1
_U64 = (1 << 64) - 1
ACTIONS = ("allow", "kill_thread", "kill_process", "log", "trap")
NUMBERED_ACTIONS = ("errno", "trace")
OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge")
MASKED_EQ = "masked_eq"
DWORD, QWORD = "dword", "qword"


class Action(NamedTuple):
    """What happens to a call; ``number`` is the value of errno and trace, else 0."""

    name: str
    number: int = 0


class Condition(NamedTuple):
    """A comparison with one argument; ``mask`` is that of masked_eq, else 0."""

    argument: int
    length: str
    operator: str
    value: int
    mask: int = 0


class Rule(NamedTuple):
    """One system call; all conditions have to be met."""

    syscall: str
    conditions: tuple[Condition, ...] = ()


class ThreadFilter(NamedTuple):
    """The filter of one thread."""

    default_action: Action
    filter_action: Action
    rules: tuple[Rule, ...]


def parse(text: bytes) -> dict[str, ThreadFilter]:
    """Return the filters by thread. Raises CompilerError."""
    try:
        document = decode_json(text)
    except JsonError as error:
        raise CompilerError(f"Cannot deserialize json: {error}") from None
    threads = _object(document, "the document")
    return {name: _filter(value, name) for name, value in threads.items()}


def _filter(value: Any, where: str) -> ThreadFilter:
    fields = _fields(value, where, ("default_action", "filter_action", "filter"))
    rules = _list(fields["filter"], f"{where}.filter")
    return ThreadFilter(
        _action(fields["default_action"], f"{where}.default_action"),
        _action(fields["filter_action"], f"{where}.filter_action"),
        tuple(_rule(rule, f"{where}.filter[{at}]") for at, rule in enumerate(rules)),
    )


def _rule(value: Any, where: str) -> Rule:
    fields = _fields(value, where, ("syscall",), ("args", "comment"))
    name = fields["syscall"]
    if not isinstance(name, str) or not name or "\0" in name:
        _wrong(f"{where}.syscall", "expected the name of a system call")
    arguments = fields.get("args")
    conditions = [] if arguments is None else _list(arguments, f"{where}.args")
    return Rule(name, tuple(_condition(each, f"{where}.args[{at}]") for at, each in enumerate(conditions)))


def _condition(value: Any, where: str) -> Condition:
    fields = _fields(value, where, ("index", "type", "op", "val"), ("comment",))
    length = fields["type"]
    if length not in (DWORD, QWORD):
        _wrong(f"{where}.type", f"expected {DWORD} or {QWORD}")
    index, number = _number(fields["index"], MAX_INDEX, f"{where}.index"), _number(fields["val"], _U64, f"{where}.val")
    operator = fields["op"]
    if isinstance(operator, str) and operator in OPERATORS:
        return Condition(index, length, operator, number)
    if isinstance(operator, dict) and list(operator) == [MASKED_EQ]:
        mask = _number(operator[MASKED_EQ], _U64, f"{where}.op.{MASKED_EQ}")
        return Condition(index, length, MASKED_EQ, number, mask)
    return _wrong(f"{where}.op", f"expected one of {', '.join(OPERATORS)}, or an object with {MASKED_EQ}")


def _action(value: Any, where: str) -> Action:
    if isinstance(value, str) and value in ACTIONS:
        return Action(value)
    if isinstance(value, dict) and len(value) == 1:
        ((name, number),) = value.items()
        if name in NUMBERED_ACTIONS:
            return Action(name, _number(number, _U16, f"{where}.{name}"))
    numbered = ", ".join(NUMBERED_ACTIONS)
    return _wrong(where, f"expected one of {', '.join(ACTIONS)}, or an object with one of {numbered}")


def _fields(value: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    fields = _object(value, where)
    for name in required:
        if name not in fields:
            _wrong(where, f"missing field {name}")
    for name in fields:
        if name not in required and name not in optional:
            _wrong(where, f"unknown field {name}")
    return fields


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(where, "expected an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _wrong(where, "expected a list")
    return value


def _number(value: Any, largest: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        _wrong(where, f"expected a number from 0 to {largest}")
    return value


def _wrong(where: str, text: str) -> NoReturn:
    raise CompilerError(f"Cannot deserialize json: {where}: {text}")
