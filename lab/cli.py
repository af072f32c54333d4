"""`./dev lab [options] [COMMAND…]`."""

from __future__ import annotations

import argparse
import os
import sys
import termios
import tty
from collections.abc import Sequence
from pathlib import Path

from devtool.process import end_on_signals
from devtool.project import LAB_FAILED_STATUS, DevError, say
from lab.runner import Lab, LabTimeoutError, Machine

_TIMEOUT_STATUS = 124
_INTERRUPTED_STATUS = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev lab",
        description="Run COMMAND in the lab: a machine emulated by QEMU (no /dev/kvm needed) that has KVM with nested "
        "paging, cgroup v2 and this host's root file system; writes are lost when it ends. The command starts in the "
        "current folder, sees this checkout and its .venv, and $LAB_EXCHANGE. Without COMMAND: a shell.",
        epilog="Exit status: COMMAND's; 124 if the time limit passed; 125 if the lab failed.",
        allow_abbrev=False,
    )
    size = Machine()
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="default: %(default)s; 0: none")
    parser.add_argument("--cpus", type=int, default=size.cpus, help="processors (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=size.memory_mib, metavar="MIB", help="default: %(default)s")
    parser.add_argument("--touched", action="store_true", help="have the host give all memory first, for measurements")
    parser.add_argument("--cpu-model", default=size.cpu_model, metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable for COMMAND")
    parser.add_argument(
        "--fetch", action="append", default=[], metavar="INSIDE=HERE", help="bring a file or folder back afterwards"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")
    return parser


def _pairs(parser: argparse.ArgumentParser, option: str, values: Sequence[str]) -> dict[str, str]:
    for value in values:
        if not all(value.partition("=")[::2]):
            parser.error(f"{option}: {value!r} lacks a part: LEFT=RIGHT is wanted")
    return {left: right for left, _, right in (value.partition("=") for value in values)}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
    environment = _pairs(parser, "--env", options.env)
    fetches = _pairs(parser, "--fetch", options.fetch)
    interactive = not command
    if interactive and not sys.stdin.isatty():
        parser.error("a COMMAND is needed when standard input is no terminal")
    end_on_signals()
    try:
        if interactive:
            say("starting the lab; leave it with exit")
        machine = Machine(options.cpus, options.memory, options.cpu_model, options.touched)
        with Lab(machine, keep=[Path.cwd()]) as lab:
            if interactive:
                return _shell(lab)
            status = lab.run(command, environment=environment, timeout=options.timeout or None)
            _fetch(lab, fetches)
            return status
    except LabTimeoutError as error:
        say(f"error: {error}")
        return _TIMEOUT_STATUS
    except DevError as error:
        say(f"error: {error}")
        return LAB_FAILED_STATUS
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS


def _fetch(lab: Lab, fetches: dict[str, str]) -> None:
    """Bring files back, as many as can be had: a command that failed may have written only some."""
    for inside, here in fetches.items():
        try:
            lab.fetch(inside, Path(os.path.abspath(here)))
        except DevError as error:
            say(f"warning: {error}")


def _shell(lab: Lab) -> int:
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        return lab.shell(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
