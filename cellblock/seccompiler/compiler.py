"""From rules to classic BPF, by libseccomp (through pyseccomp)."""

from __future__ import annotations

import os

from base.lean_typing import Any, Mapping
from cellblock.seccompiler.errors import CompilerError
from cellblock.seccompiler.source import DWORD, MASKED_EQ, Action, Condition, ThreadFilter

ARCHITECTURES = ("x86_64", "aarch64")
_LOW_HALF = 0xFFFFFFFF


def compile_filters(filters: Mapping[str, ThreadFilter], architecture: str, *, basic: bool = False) -> dict[str, bytes]:
    """Return raw BPF by thread. ``basic``: without the comparisons of arguments. Raises CompilerError."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise CompilerError(f"libseccomp cannot be used: {error}; install libseccomp2 and pyseccomp") from None
    return {name: _compile(pyseccomp, name, each, architecture, basic) for name, each in filters.items()}


def _compile(library: Any, name: str, chosen: ThreadFilter, architecture: str, basic: bool) -> bytes:
    made = library.SyscallFilter(_action(library, chosen.default_action))
    target = getattr(library.Arch, architecture.upper())
    try:
        if target != library.system_arch():
            made.add_arch(target)
            made.remove_arch(library.Arch.NATIVE)
    except OSError as error:
        raise CompilerError(f"libseccomp cannot compile for {architecture}: {error}") from None
    action = _action(library, chosen.filter_action)
    for at, rule in enumerate(chosen.rules):
        where = f"{name}.filter[{at}]: {rule.syscall}"
        conditions = () if basic else rule.conditions
        try:
            made.add_rule(action, rule.syscall, *(_comparison(library, each) for each in conditions))
        except (OSError, ValueError, OverflowError) as error:
            raise CompilerError(f"{where}: libseccomp refuses the rule: {error}") from None
    return _export(made)


def _action(library: Any, action: Action) -> Any:
    if action.name in ("errno", "trace"):
        return getattr(library, action.name.upper())(action.number)
    names = {"kill_thread": "KILL", "kill_process": "KILL_PROCESS"}
    return getattr(library, names.get(action.name, action.name.upper()))


def _comparison(library: Any, condition: Condition) -> Any:
    """Compare all 64 bits, but for the equality of a dword: C libraries leave what they like in the upper half."""
    if condition.operator == MASKED_EQ:
        return library.Arg(condition.argument, library.MASKED_EQ, condition.mask, condition.value)
    if condition.operator == "eq" and condition.length == DWORD:
        return library.Arg(condition.argument, library.MASKED_EQ, _LOW_HALF, condition.value)
    return library.Arg(condition.argument, getattr(library, condition.operator.upper()), condition.value)


def _export(made: Any) -> bytes:
    descriptor = os.memfd_create("filter", os.MFD_CLOEXEC)
    with open(descriptor, "w+b") as file:
        made.export_bpf(file)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
