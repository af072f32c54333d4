"""The commands of ./dev."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from devtool import policies, setup, testing
from devtool.process import end_on_signals
from devtool.project import CHECKED, LAUNCHERS, PYTHON, ROOT, DevError, existing, say

_SIGNAL_STATUS = 128


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if arguments[:1] == ["lab"]:  # everything after it is the lab's, `--` included
        return _tool("lab", list(arguments[1:]))
    if arguments[:1] == ["image"]:
        return _tool("lab.guest_disk", list(arguments[1:]))
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = options.run
    try:
        return command(options, rest)
    except DevError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return _SIGNAL_STATUS + 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev", description="Cellblock's developer tool.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
        # Abbreviations are off so that an option meant for pytest or a guest is never taken for one of ours.
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    add("setup", _setup, "Install what is missing: Debian packages, .venv with locked versions, the programs.")
    add("demo", _demo, "Boot Debian from a disk in a jailed microVM; show its drive, its cells and their walls.")
    test = add("test", _test, "Run the tests. Other arguments go to pytest; paths choose tests.")
    tier = test.add_mutually_exclusive_group()
    tier.add_argument("--quick", action="store_true", help="only what runs on this host in under three minutes")
    tier.add_argument("--soak", metavar="NAME", help="only tests marked soak(NAME), at full count ('all': every)")
    add("policies", _policies, "record [PYTEST-ARGUMENTS]: what the cells ask of the kernel, next to their policies.")
    add("lint", _lint, "Run ruff and mypy --strict.")
    bench = add("bench", _bench, "Run a benchmark. Other arguments go to it.")
    bench.add_argument("name", metavar="NAME", help="a module of bench/, without the .py")
    commands.add_parser("lab", help="Run a command in the lab: an emulated machine with KVM and nested paging.")
    commands.add_parser("image", help="Make the disk of Debian packages that guests of tests and the demo boot from.")
    add("where", _where, "Print the folder that holds the installed programs firecracker and jailer.")
    return parser


def _no_rest(rest: list[str]) -> None:
    if rest:
        raise DevError(f"unexpected argument {rest[0]!r}; see --help")


def _setup(_options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    setup.set_up()
    say(f"ready: programs in {LAUNCHERS}")
    return 0


def _where(_options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    setup.set_up()
    print(LAUNCHERS)
    return 0


def _demo(_options: argparse.Namespace, rest: list[str]) -> int:
    setup.set_up()
    return _module("lab.demo", rest)


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    name: str = options.name
    if not name.isidentifier() or not (ROOT / "bench" / f"{name}.py").is_file():
        known = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if not path.stem.startswith("_"))
        raise DevError(f"there is no benchmark {name!r}; there are: {', '.join(known) or 'none yet'}")
    setup.set_up()
    return _module(f"bench.{name}", rest)


def _tool(module: str, arguments: list[str]) -> int:
    """Run a tool that reads its own command line, in this process's place."""
    try:
        setup.set_up()
    except DevError as error:
        say(f"error: {error}")
        return 1
    return _module(module, arguments, replace=True)


def _test(options: argparse.Namespace, rest: list[str]) -> int:
    end_on_signals()
    setup.set_up()
    return testing.run_tests(quick=options.quick, soak=options.soak, arguments=rest)


def _policies(_options: argparse.Namespace, rest: list[str]) -> int:
    setup.set_up()
    return policies.main(rest)


def _lint(_options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    setup.set_up()
    statuses = [subprocess.run(command, cwd=ROOT, check=False).returncode for command in lint_commands()]
    return 1 if any(statuses) else 0


def lint_commands() -> list[list[str]]:
    """Return the linters' command lines; they run in the checkout."""
    checked = existing(CHECKED)
    cache = ROOT / "build"
    ruff = [str(PYTHON), "-m", "ruff", "check", "--quiet", "--output-format=concise"]
    mypy = [str(PYTHON), "-m", "mypy", "--strict", "--no-error-summary"]
    return [
        [*ruff, "--cache-dir", str(cache / "ruff"), *checked],
        [*mypy, "--cache-dir", str(cache / "mypy"), *checked],
    ]


def _module(name: str, arguments: list[str], *, replace: bool = False) -> int:
    """Run a module of the checkout with the virtual environment's Python, from where the user stands."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(PYTHON), "-m", name, *arguments]
    if replace:  # signals and the terminal then are the module's own
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    return subprocess.run(command, check=False, env=environment).returncode
