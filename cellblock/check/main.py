"""``cellblock check`` reports what ``jailer --check`` does. Exit status: 0 it can, 1 it cannot, 2 wrong usage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jailer import host_check


def main(argv: Sequence[str]) -> int:
    """Run the command with a command line (``argv[0]`` is its name); return the exit status."""
    parser = argparse.ArgumentParser(
        prog=Path(argv[0]).name,
        description="Tells whether this host can run jailed microVMs, what is missing, and how to mend it: kernel, "
        "privileges, KVM, placement, namespaces, mounts, seccomp, cgroups, limits. Launches nothing.",
    )
    parser.parse_args(argv[1:])
    return host_check.main()
