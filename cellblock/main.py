"""The program ``cellblock``: hands the command line to one of its commands, and loads only that.

Exit status: what the command says; 2 for wrong usage.
"""

from __future__ import annotations

import importlib
import os
import sys

from base.errno_text import errno_text
from base.lean_typing import NamedTuple, Sequence
from base.version import CELLBLOCK_VERSION, FIRECRACKER_VERSION, PRODUCT_NAME

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


class Command(NamedTuple):
    """``module`` has a ``main(argv)``; ``argv[0]`` is what an error or a help text is to call the command."""

    module: str
    summary: str


COMMANDS = {
    "check": Command("cellblock.check.main", "tell whether this host can run jailed microVMs, and what is missing"),
    "seccompiler": Command("cellblock.seccompiler.main", "compile custom seccomp filters for --seccomp-filter"),
    "cpu-template": Command("cellblock.cpu_template.main", "make, compare and check CPU templates"),
    "overlay": Command("cellblock.overlay.main", "make overlays of drives, look into them, commit and rebase them"),
}


def main(argv: Sequence[str]) -> int:
    """Run the program with a command line (``argv[0]`` is the program's name); return the exit status."""
    program = os.path.basename(argv[0])
    if len(argv) < 2:
        sys.stderr.write(_help(program))
        return EXIT_USAGE
    name, rest = argv[1], argv[2:]
    if name in ("--help", "-h"):
        sys.stdout.write(_help(program))
        return EXIT_OK
    if name in ("--version", "-V"):
        sys.stdout.write(f"{PRODUCT_NAME} {CELLBLOCK_VERSION} (Firecracker v{FIRECRACKER_VERSION})\n")
        return EXIT_OK
    command = COMMANDS.get(name)
    if command is None:
        sys.stderr.write(f"{program}: {_unknown(name)}\n\nFor more information try {program} --help.\n")
        return EXIT_USAGE
    called = f"{program} {name}"
    try:
        status: int = importlib.import_module(command.module).main([called, *rest])
    except OSError as error:
        sys.stderr.write(f"{called}: {error.filename or 'error'}: {errno_text(error)}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"{called}: interrupted\n")
        return EXIT_FAILED
    return status


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"there is no option {name!r}"
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1)
    return f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _help(program: str) -> str:
    width = max(map(len, (*COMMANDS, "--version, -V")))
    lines = [
        f"{PRODUCT_NAME} {CELLBLOCK_VERSION}: what a host needs around its microVMs.",
        "",
        f"usage: {program} COMMAND [OPTION]…",
        "",
        "commands:",
        *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "options:",
        f"  {'--help, -h':{width}}  show this text; after a command, what it takes",
        f"  {'--version, -V':{width}}  show the version",
    ]
    return "\n".join(lines) + "\n"
