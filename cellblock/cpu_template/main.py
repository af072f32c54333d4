"""Command line of ``cellblock cpu-template``. Exit status: 0 done, 1 failed or found a difference, 2 wrong usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from base.version import FIRECRACKER_VERSION
from cellblock.cpu_template import files, fingerprint
from cellblock.cpu_template.capture import Target, cpu_config
from cellblock.cpu_template.errors import DifferenceError, ToolError
from cellblock.cpu_template.patterns import bit_count, differences, strip

EXIT_OK = 0
EXIT_FAILED = 1

DEFAULT_DUMP = Path("cpu_config.json")
DEFAULT_FINGERPRINT = Path("fingerprint.json")
DEFAULT_SUFFIX = "_stripped"


def main(argv: Sequence[str]) -> int:
    """Run the program with a command line (``argv[0]`` is the program's name); return the exit status."""
    arguments = _parser(Path(argv[0]).name).parse_args(argv[1:])
    try:
        text: str = arguments.command(arguments)
    except (ToolError, OSError) as error:
        sys.stderr.write(f"{Path(argv[0]).name}: {error}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{text}\n")
    return EXIT_OK


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Makes, compares and checks CPU templates.")
    parser.add_argument("--version", "-V", action="version", version=f"{program} v{FIRECRACKER_VERSION}")
    groups = parser.add_subparsers(required=True, metavar="template|fingerprint")

    template = groups.add_parser("template", help="CPU templates").add_subparsers(required=True, metavar="COMMAND")
    dump = template.add_parser("dump", help="write what a guest's CPU looks like as a template")
    _add_target(dump)
    _add_output(dump, DEFAULT_DUMP)
    dump.set_defaults(command=_dump)
    strip_ = template.add_parser("strip", help="remove from templates what all of them say")
    strip_.add_argument("--paths", "-p", type=Path, nargs="+", required=True, metavar="FILE", help="two or more files")
    strip_.add_argument(
        "--suffix", "-s", default=DEFAULT_SUFFIX, help="of the written files' names (default: %(default)s)"
    )
    strip_.set_defaults(command=_strip)
    verify = template.add_parser("verify", help="check that a guest gets what a template says")
    _add_target(verify)
    verify.set_defaults(command=_verify)

    prints = groups.add_parser("fingerprint", help="what decides how a guest's CPU looks on this host")
    fingers = prints.add_subparsers(required=True, metavar="COMMAND")
    take = fingers.add_parser("dump", help="write this host's fingerprint")
    _add_target(take)
    _add_output(take, DEFAULT_FINGERPRINT)
    take.set_defaults(command=_fingerprint)
    compare = fingers.add_parser("compare", help="compare two fingerprints; exit status 1 if they differ")
    compare.add_argument("--prev", "-p", type=Path, required=True, metavar="FILE", help="the earlier one")
    compare.add_argument("--curr", "-c", type=Path, required=True, metavar="FILE", help="the later one")
    compare.add_argument(
        "--filters",
        "-f",
        nargs="+",
        choices=fingerprint.FILTERS,
        default=fingerprint.FILTERS,
        metavar="FIELD",
        help=f"fields to compare (default: all): {', '.join(fingerprint.FILTERS)}",
    )
    compare.set_defaults(command=_compare)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", "-c", type=Path, metavar="FILE", help="configuration file; without one a microVM of 1 vCPU"
    )
    parser.add_argument("--template", "-t", type=Path, metavar="FILE", help="CPU template; replaces the config's")


def _add_output(parser: argparse.ArgumentParser, default: Path) -> None:
    parser.add_argument(
        "--output", "-o", type=Path, default=default, metavar="FILE", help="file to write (default: %(default)s)"
    )


def _dump(arguments: argparse.Namespace) -> str:
    template = cpu_config(Target(arguments.config, arguments.template))
    files.write_template(arguments.output, template)
    return f"{arguments.output}: {len(template.cpuid_modifiers)} CPUID leaves, {len(template.msr_modifiers)} MSRs"


def _strip(arguments: argparse.Namespace) -> str:
    paths: list[Path] = arguments.paths
    if len(paths) < 2:
        raise ToolError("two or more templates can be stripped of what they have in common, not one")
    # All are read before one is written: with an empty suffix they are replaced.
    stripped = strip([files.read_template(path) for path in paths])
    lines = []
    for path, template in zip(paths, stripped, strict=True):
        output = path.with_name(f"{path.stem}{arguments.suffix}{path.suffix}")
        files.write_template(output, template)
        lines.append(f"{output}: {bit_count(template)} bits differ")
    return "\n".join(lines)


def _verify(arguments: argparse.Namespace) -> str:
    target = Target(arguments.config, arguments.template)
    template = target.required_template()
    lines = differences(template, cpu_config(target))
    if lines:
        raise DifferenceError("The guest does not get what the template says:", lines)
    return f"The guest gets all {bit_count(template)} bits of the template."


def _fingerprint(arguments: argparse.Namespace) -> str:
    taken = fingerprint.take(cpu_config(Target(arguments.config, arguments.template)))
    files.write_json(arguments.output, taken.to_json())
    return f"{arguments.output}: the fingerprint of this host"


def _compare(arguments: argparse.Namespace) -> str:
    fingerprint.compare(fingerprint.read(arguments.prev), fingerprint.read(arguments.curr), arguments.filters)
    return "The fingerprints do not differ."
