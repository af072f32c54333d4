"""Command line of ``cellblock overlay``. Exit status: 0 done, 1 failed or something is wrong, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from base.boot_id import read_boot_id
from cellblock.overlay import report
from cellblock.overlay.commit import commit
from cellblock.overlay.files import created, is_in_use, opened
from cellblock.overlay.progress import size_text
from cellblock.overlay.rebase import accept, rebase
from virtio.block.overlay.file import begin_session, create_overlay, read_overlay
from virtio.block.overlay.layout import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS
from virtio.errors import OverlayError

EXIT_OK = 0
EXIT_FAILED = 1
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_OVERLAY, _BASE = "the overlay", "the base"


def main(argv: Sequence[str]) -> int:
    """Run the command with a command line (``argv[0]`` is its name); return the exit status."""
    program = argv[0]
    arguments = _parser(program).parse_args(argv[1:])
    try:
        status: int = arguments.command(arguments)
    except OverlayError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return EXIT_FAILED
    return status


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="An overlay holds what a machine has changed of a drive whose base many machines share. None of "
        "these commands works on an overlay that a machine is using, but info.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_create(commands)
    info = _command(commands, "info", _info, "tell what is in an overlay")
    info.add_argument("--json", action="store_true", help="for programs")
    check = _command(commands, "check", _check, "tell whether a machine could use an overlay; exit status 1 if not")
    check.add_argument("--base", type=Path, metavar="FILE", help="compare it with its base, too")
    check.add_argument(
        "--drop-volatile",
        action="store_true",
        help="forget what was not flushed: for a file system that was lost without a reboot",
    )
    merge = _command(commands, "commit", _commit, "copy an overlay into its base, and empty it")
    merge.add_argument(
        "--base", type=Path, required=True, metavar="FILE", help="every other overlay over it is of no use then"
    )
    move = _command(commands, "rebase", _rebase, "put an overlay over another base; the drive says what it said")
    move.add_argument("--base", type=Path, required=True, metavar="FILE", help="the new one")
    how = move.add_mutually_exclusive_group(required=True)
    how.add_argument("--from", type=Path, dest="old", metavar="FILE", help="the old one: what differs is copied")
    how.add_argument("--same-content", action="store_true", help="believe that both bases say the same")
    return parser


def _add_create(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = _command(commands, "create", _create, "make an overlay; a machine makes one itself if the file is empty")
    create.add_argument("--base", type=Path, required=True, metavar="FILE", help="file or block device to read from")
    create.add_argument(
        "--size", type=_size, metavar="BYTES", help="of the drive, with K, M, G or T (default: the base's)"
    )
    create.add_argument(
        "--cluster-size",
        type=_cluster_bits,
        metavar="BYTES",
        help="a power of two, 4K to 2M (default: the smallest with a map of at most 1M)",
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, function: object, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.add_argument("overlay", type=Path, metavar="OVERLAY", help="the overlay's file")
    parser.set_defaults(command=function)
    return parser


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS and text else (text, "")
    if not number.isdecimal() or len(number) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a number, with K, M, G or T behind it")
    return int(number) << _UNITS[unit]


def _cluster_bits(text: str) -> int:
    size = _size(text)
    bits = size.bit_length() - 1
    if size != 1 << max(bits, 0) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise argparse.ArgumentTypeError(f"{text!r}: clusters have 4K, 8K, 16K … 2M")
    return bits


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return EXIT_OK


def _create(arguments: argparse.Namespace) -> int:
    with opened(arguments.base, _BASE, writable=False) as base, created(arguments.overlay) as disk:
        create_overlay(disk, base, os.getrandom(16), arguments.size, arguments.cluster_size)
        made = read_overlay(disk, b"").geometry
    clusters = f"{made.clusters} clusters of {size_text(1 << made.cluster_bits)}"
    return _say(f"{arguments.overlay}: a drive of {size_text(made.size)}, {clusters}")


def _info(arguments: argparse.Namespace) -> int:
    with opened(arguments.overlay, _OVERLAY, writable=False, locked=False) as disk:
        overlay = read_overlay(disk, read_boot_id())
        allocated = os.fstat(disk.fd).st_blocks << 9
        facts = report.describe(overlay, allocated, in_use=is_in_use(disk))
    return _say(json.dumps(facts, indent=2) if arguments.json else report.text(facts))


def _check(arguments: argparse.Namespace) -> int:
    with opened(arguments.overlay, _OVERLAY, writable=arguments.drop_volatile) as disk:
        overlay = read_overlay(disk, b"" if arguments.drop_volatile else read_boot_id())
        if arguments.drop_volatile:
            begin_session(overlay, b"")
        if arguments.base is None:
            wrong, notes = report.problems(overlay, None)
        else:
            with opened(arguments.base, _BASE, writable=False) as base:
                wrong, notes = report.problems(overlay, base)
    for line in (*wrong, *(f"note: {note}" for note in notes)):
        sys.stdout.write(f"{arguments.overlay}: {line}\n")
    if wrong:
        return EXIT_FAILED
    return _say(f"{arguments.overlay}: sound, {overlay.map.count} of {overlay.geometry.clusters} clusters in it")


def _commit(arguments: argparse.Namespace) -> int:
    with (
        opened(arguments.overlay, _OVERLAY, writable=True) as disk,
        opened(arguments.base, _BASE, writable=True) as base,
    ):
        copied = commit(read_overlay(disk, read_boot_id()), disk, base)
    return _say(f"{arguments.base}: {size_text(copied)} from {arguments.overlay}, which is empty now")


def _rebase(arguments: argparse.Namespace) -> int:
    with (
        opened(arguments.overlay, _OVERLAY, writable=True) as disk,
        opened(arguments.base, _BASE, writable=False) as new,
    ):
        overlay = read_overlay(disk, read_boot_id())
        begin_session(overlay, read_boot_id())
        if arguments.same_content:
            accept(overlay, new)
            return _say(f"{arguments.overlay}: over {arguments.base}, which was believed to say the same")
        with opened(arguments.old, _BASE, writable=False) as old:
            copied = rebase(overlay, old, new)
    return _say(f"{arguments.overlay}: over {arguments.base}; {size_text(copied)} differ and are in the overlay now")
