"""Runs the attack suite inside sealed cells, and writes the page that shows it (docs/attack-table.md).

``python -m tests.harness.attacks`` runs it and prints what differs from the table; ``--write`` rewrites the page.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from devtool.project import ROOT
from ipc import drills
from ipc.launch_plan import ROLE_DEVICE
from tests.attack_table import ENDS, OPEN, REASONS, REPLACED, ROWS
from tests.harness.jail import JailedMicrovm, microvm, stand_in, wait_for

PAGE = ROOT / "docs" / "attack-table.md"
#: A cell's place in a row: with every wall on, then without the filter alone.
CELLS = ("vcpu", "vmm", "supervisor", "device", "device-running")
TITLES = {
    "vcpu": "worker",
    "vmm": "controller",
    "supervisor": "supervisor",
    "device": "device cell",
    "device-running": "device cell, running",
}
#: Of the filter alone: it is EHWPOISON, which only memory that is broken gives.
FILTERED = 133
FILTER = "filter"
#: The jailer's flags for the two columns of a cell.
GUARDED = ("--seccomp-mode", f"errno={FILTERED}")
BARE = ("--without", "seccomp")
_OUTCOME = re.compile(r"drill ([^:\n]+): (.*)$", re.MULTILINE)
_REFUSED = re.compile(r"refused: .*\((-?\d+)\)$")


class Row(NamedTuple):
    """What is expected of one attempt in one cell: ``filter``, ``open``, or errnos that a kernel may refuse it by."""

    guarded: str
    bare: str


def row(name: str, cell: str) -> Row:
    """Return the expectations of the table."""
    columns = ROWS[name].split(" | ")
    place = CELLS.index(cell)
    while columns[place] == "=":
        place -= 1
    guarded, bare = columns[place].split()
    return Row(guarded, bare)


def meets(seen: str, expected: str) -> bool:
    """Is an outcome one of those that the table allows (errnos differ between kernels)?"""
    return seen in expected.split(",")


def outcomes(text: str) -> dict[str, str]:
    """Return attempt → ``filter``, ``open`` or the name of an errno, from what cells have printed."""
    found = {}
    for name, outcome in _OUTCOME.findall(text):
        match = _REFUSED.match(outcome)
        number = int(match[1]) if match else 0
        found[name] = (FILTER if number == FILTERED else errno.errorcode[number]) if number else OPEN
    return found


def arguments(cell: str, names: Iterable[str]) -> list[str]:
    """Return the jailer's flags that let a cell make these attempts."""
    return [word for name in names for word in ("--drill", f"{cell}:{name}")]


def attempts(cell: str, *, filtered: bool) -> list[str]:
    """Return what can be tried in one launch: not what ends the cell, or makes something else of it."""
    left_out = ENDS if filtered else REPLACED[cell]
    return [name for name in drills.ATTEMPTS if name not in left_out]


@contextlib.contextmanager
def launch(base: Path, cell: str, *options: str, microvm_id: str = "") -> Iterator[JailedMicrovm]:
    """Make a launch that has such a cell, which is gone at the end of the block.

    The controller asks for device cells only when it has a device: so a stand-in does, and what runs in the device cell
    behind its real walls is a stand-in, too.
    """
    if not cell.startswith(ROLE_DEVICE):
        with microvm(base, *options, microvm_id=microvm_id) as jailed:
            yield jailed
        return
    jailed = stand_in(base, "worker-and-device-cell", *options, microvm_id=microvm_id)
    try:
        yield jailed
    finally:
        jailed.destroy()


def run(base: Path, cell: str, names: Sequence[str], *options: str, microvm_id: str = "") -> dict[str, str]:
    """Let a cell of one launch make attempts one after the other; return what came of each."""
    with launch(base, cell, *arguments(cell, names), *options, microvm_id=microvm_id) as jailed:
        jailed.start()
        found: dict[str, str] = wait_for(lambda: _all(jailed, names), lambda: f"{cell}: {jailed.describe()}")
        return found


def _all(jailed: JailedMicrovm, names: Sequence[str]) -> dict[str, str] | None:
    found = outcomes(jailed.output())
    return found if set(names) <= set(found) else None


def differences(cell: str, seen: dict[str, str], *, filtered: bool) -> list[str]:
    """Return a line for each attempt that did not go as the table says."""
    expected = {name: row(name, cell)[0 if filtered else 1] for name in seen}
    return [
        f"{cell}: {name}: expected {expected[name]}, seen {outcome}"
        for name, outcome in seen.items()
        if not meets(outcome, expected[name])
    ]


# ---------------------------------------------------------------- the page

_HEAD = """# Attack table

What code inside a sealed cell can do: every attempt of `ipc/drills/`, made in a real cell of a jailed launch right
after its seal, and what came of it. `tests/jail/test_attack_table.py` runs it all and fails where a cell is not what
this page says; the rows are in `tests/attack_table.py`, this page is written by
`python -m tests.harness.attacks --write`.

Each cell has two columns: with every wall on, and without its filter alone (`--without seccomp`), which shows the walls
behind it.

| word | means |
| --- | --- |
| filter | the filter forbids the call: it ends the cell (SIGSYS; 148 for a controller) |
| ends | so does the filter, in every mode, because the call is not one of x86-64's own |
| EPERM, … | refused with that errno; several: it differs between kernels |
| open | done. With every wall on this has a reason, below the table |
| – | not tried: it would make something else of the process |

The supervisor is made to run code right before it forks its first worker, with its filter on. A worker is attacked as
soon as it is welcomed, at the setup stage of its seal; what its second filter takes away is in [seccomp](seccomp.md),
and judged by `tests/unit/jailer/test_seccomp_forbids.py`. A device cell is attacked twice: when it is verified, and
behind its second filter.

"""


def page() -> str:
    """Return the text of docs/attack-table.md."""
    lines = [_HEAD.rstrip(), ""]
    for kind in filter(lambda kind: kind.ATTEMPTS, drills.KINDS):
        lines += [f"## {kind.__name__.rpartition('.')[2].capitalize()}", "", f"{(kind.__doc__ or '').strip()}", ""]
        lines += [f"| attempt | {' | '.join(f'{TITLES[cell]} | … without filter' for cell in CELLS)} |"]
        lines += [f"| --- |{' --- | --- |' * len(CELLS)}"]
        lines += [f"| {name} | {' | '.join(_shown(name, cell) for cell in CELLS)} |" for name in kind.ATTEMPTS]
        lines.append("")
    lines += ["## Why open", "", "| attempt | cell | why |", "| --- | --- | --- |"]
    lines += [f"| {name} | {TITLES[cell]} | {why} |" for (cell, name), why in REASONS.items()]
    return "\n".join(lines) + "\n"


def _shown(name: str, cell: str) -> str:
    expected = row(name, cell)
    bare = "–" if name in REPLACED[cell] else expected.bare.replace(",", ", ")
    return f"{expected.guarded.replace(',', ', ')} | {bare}"


def main(arguments: Sequence[str]) -> int:
    """Run the suite and say what differs, or write the page."""
    if "--write" in arguments:
        PAGE.write_text(page())
        return 0
    import tempfile

    wrong = 0
    with tempfile.TemporaryDirectory(prefix="jail-") as directory:
        base = Path(directory) / "base"
        Path(directory).chmod(0o755)
        base.mkdir(mode=0o755)
        for cell in CELLS:
            for filtered, option in ((True, GUARDED), (False, BARE)):
                name = f"{base.parent.name[-8:].replace('_', '-')}-{cell}-{int(filtered)}"
                seen = run(base, cell, attempts(cell, filtered=filtered), *option, microvm_id=name)
                for line in (found := differences(cell, seen, filtered=filtered)):
                    print(("with filter: " if filtered else "without filter: ") + line)
                wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
