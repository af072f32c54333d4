"""The command line of ``cellblock seccompiler``, and of ``seccompiler-bin``: Firecracker's flags."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from base.errno_text import errno_text
from base.lean_typing import Sequence
from base.version import FIRECRACKER_VERSION
from cellblock.seccompiler.compiler import ARCHITECTURES, compile_filters
from cellblock.seccompiler.errors import CompilerError
from cellblock.seccompiler.source import parse
from ipc.errors import FilterFileError
from ipc.filter_file import encode

DEFAULT_OUTPUT = "seccomp_binary_filter.out"
EXIT_OK = 0
EXIT_FAILED = 1


def main(argv: Sequence[str]) -> int:
    """Run with a command line (``argv[0]`` is the program's name); return the exit status."""
    options = _options(argv)
    try:
        _run(options)
    except CompilerError as error:
        sys.stderr.write(f"{os.path.basename(argv[0])}: {error}\n")
        return EXIT_FAILED
    return EXIT_OK


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=os.path.basename(argv[0]),
        description="Compile the JSON of custom seccomp filters to the file that firecracker --seccomp-filter takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--input-file", required=True, metavar="FILE", help="JSON with a filter for each thread")
    parser.add_argument("--target-arch", required=True, choices=ARCHITECTURES, help="architecture that it is for")
    parser.add_argument("--output-file", default=DEFAULT_OUTPUT, metavar="FILE", help=f"default: {DEFAULT_OUTPUT}")
    parser.add_argument("--basic", action="store_true", help="leave out the comparisons of arguments (deprecated)")
    parser.add_argument("--split-output", action="store_true", help="write the raw BPF of each thread, too: THREAD.bpf")
    parser.add_argument("--version", "-V", action="version", version=f"Seccompiler-bin v{FIRECRACKER_VERSION}")
    return parser.parse_args(list(argv[1:]))


def _run(options: argparse.Namespace) -> None:
    try:
        text = Path(options.input_file).read_bytes()
    except OSError as error:
        raise CompilerError(f"Cannot open input file: {options.input_file}: {errno_text(error)}") from None
    programs = compile_filters(parse(text), options.target_arch, basic=options.basic)
    try:
        content = encode(programs)
    except FilterFileError as error:
        raise CompilerError(f"Cannot write {options.output_file}: {error}") from None
    if options.basic:
        sys.stderr.write("seccompiler: --basic is deprecated: without comparisons, filters allow more than meant\n")
    output = Path(options.output_file)
    _write(output, content)
    if options.split_output:
        for name, program in programs.items():
            if "/" in name:
                raise CompilerError(f"Cannot create output file: {name!r} is no file name")
            _write(output.parent / f"{name}.bpf", program)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CompilerError(f"Cannot create output file: {path}: {errno_text(error)}") from None
