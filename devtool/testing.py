"""./dev test: the tiers, in stages, with one closing line over all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from devtool import process
from devtool.project import LAB_FAILED_STATUS, PYTHON, ROOT, DevError, say

#: Folders of tests/ whose tests share nothing with other processes: some at a time.
_PARALLEL = ("unit", "fuzz")
#: One more than the CPUs that there are at least: some tests wait.
_PARALLEL_COUNT = 3
#: Folders whose tests use the machine (KVM, cgroups, mounts, timing): one at a time.
_SERIAL = ("kvm", "jail")
_LAB = "lab"
_LAB_TIMEOUT_SECONDS = 15 * 60
_SOAK_TIMEOUT_SECONDS = 6 * 60 * 60
_NO_TESTS_COLLECTED = 5
#: Importing them takes eight seconds of the emulated machine.
_WITHOUT_SLOW_PLUGINS = ("-p", "no:hypothesispytest", "-p", "no:xdist")


class Counts(NamedTuple):
    """Outcome of a stage, in tests."""

    passed: int
    failed: int
    skipped: int

    def __add__(self, other: object) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)


class Stage(NamedTuple):
    """One pytest process."""

    name: str
    paths: list[str]
    options: list[str]
    in_lab: bool = False


def has_hardware_paging() -> bool:
    """Tell whether this host's KVM uses hardware second-stage paging (EPT or NPT), so that Linux guests run here."""
    for parameter in ("/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"):
        try:
            if Path(parameter).read_text().strip() in {"Y", "1"}:
                return os.access("/dev/kvm", os.R_OK | os.W_OK)
        except OSError:
            continue
    return False


def plan_stages(paths: Sequence[str], *, quick: bool) -> list[Stage]:
    """Divide the tests into stages. `paths` (with optional ::test) narrows them; none means all."""
    lab_here = has_hardware_paging()
    stages = [
        Stage("host, parallel", _select(_PARALLEL, paths), ["-n", str(_PARALLEL_COUNT), "--dist", "worksteal"]),
        Stage("host", _select(_SERIAL, paths), []),
    ]
    if not quick:
        files = _lab_files(_select((_LAB,), paths))
        stages += [Stage(f"lab, {Path(path).name}", [path], [], in_lab=not lab_here) for path in files]
    return [stage for stage in stages if stage.paths]


def _lab_files(paths: Sequence[str]) -> list[str]:
    """Return the test files behind these paths: each gets a machine of its own, which no other file has worn out."""
    files: list[str] = []
    for path in paths:
        folder = ROOT / path
        found = folder.rglob("test_*.py") if folder.is_dir() else [folder.parent / Path(path).name]
        files += sorted(str(file.relative_to(ROOT)) for file in found)
    return files


def _select(folders: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return what to hand to pytest for these folders of tests/."""
    known = [f"tests/{folder}" for folder in folders if any((ROOT / "tests" / folder).rglob("test_*.py"))]
    if not paths:
        return known
    chosen: list[str] = []
    for path in paths:
        wanted = os.path.relpath(os.path.abspath(path.partition("::")[0]), ROOT)
        if any(wanted == folder or wanted.startswith(folder + "/") for folder in known):
            chosen.append(wanted + path[len(path.partition("::")[0]) :])
        else:
            chosen += [folder for folder in known if folder.startswith(wanted + "/")]
    return chosen


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell test paths from pytest's options: a path names something that exists under tests/.

    Raises DevError for an argument that looks like a test file but is none.
    """
    paths: list[str] = []
    options: list[str] = []
    for argument in arguments:
        file = Path(argument.partition("::")[0])
        inside = file.resolve().is_relative_to(ROOT / "tests")
        if not argument.startswith("-") and inside and file.exists():
            paths.append(argument)
        elif argument.endswith(".py") or "::" in argument:
            raise DevError(f"no such test: {argument}")
        else:
            options.append(argument)
    return paths, options


def run_tests(*, quick: bool, soak: str | None, arguments: Sequence[str]) -> int:
    """Run the tests; print one closing line `N passed, N failed, N skipped`; return the exit status."""
    paths, options = split_arguments(arguments)
    stages = plan_stages(paths, quick=quick)
    if not stages:
        raise DevError("no tests chosen")
    environment = {"CELLBLOCK_SOAK": soak} if soak else {}
    if soak:
        stages = [stage for stage in stages if not stage.in_lab or _takes_part(stage, soak)]
        options = [f"--timeout={_SOAK_TIMEOUT_SECONDS}", *options]
    if quick:
        options = ["-m", "not slow and not lab", *options]
    total = Counts(0, 0, 0)
    failed_stages: list[str] = []
    deaths = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cellblock-test-") as scratch:
        for number, stage in enumerate(stages):
            say(f"tests, stage {stage.name}: {' '.join(stage.paths)}")
            report = Path(scratch) / f"{number}.xml"
            status = _run_stage(stage, options, environment, report)
            if stage.in_lab and status == LAB_FAILED_STATUS:
                # Its text has told of it. QEMU's software CPU has lost machines (docs/lab.md); no test has failed.
                say(f"tests, stage {stage.name}: the emulated machine died; once more, in a new one")
                deaths += 1
                report.unlink(missing_ok=True)
                status = _run_stage(stage, options, environment, report)
            counts = read_report(report)
            if status not in {0, _NO_TESTS_COLLECTED} or (counts is None and status != _NO_TESTS_COLLECTED):
                failed_stages.append(stage.name)
                if counts is None or counts.failed == 0:  # died without telling of a failed test
                    counts = (counts or Counts(0, 0, 0)) + Counts(0, 1, 0)
            total += counts or Counts(0, 0, 0)
    say(f"tests took {time.monotonic() - started:.0f} s")
    if deaths:
        say(f"emulated machines that died: {deaths}")
    if failed_stages:
        say(f"failed stages: {', '.join(failed_stages)}")
    if total.passed + total.failed == 0:
        say("no test ran")
        total += Counts(0, 1, 0)
    # A stage that died may have left its line unfinished: the closing one stands alone.
    print(f"\n{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed else 0


def _takes_part(stage: Stage, soak: str) -> bool:
    """Can this soak have tests in a stage? A machine that is started for none takes a quarter of a minute."""
    texts = [(ROOT / path.partition("::")[0]).read_text() for path in stage.paths]
    return any("mark.soak(" in text if soak == "all" else f'mark.soak("{soak}"' in text for text in texts)


def _run_stage(stage: Stage, options: list[str], environment: dict[str, str], report: Path) -> int:
    pytest = [str(PYTHON), "-m", "pytest", *stage.options, *stage.paths, *options]
    if stage.in_lab:
        # Outside, where the cache is kept: what the lab writes is lost, and it has no network.
        for module in ("lab.guest_image", "lab.guest_disk", "tests.guests.build"):
            subprocess.run([str(PYTHON), "-m", module], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        inside = "/run/lab/exchange/report.xml"
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        limit = str(_SOAK_TIMEOUT_SECONDS if environment else _LAB_TIMEOUT_SECONDS)
        lab = [str(PYTHON), "-m", "lab", "--timeout", limit, f"--fetch={inside}={report}", *variables, "--"]
        command = [*lab, *pytest, *_WITHOUT_SLOW_PLUGINS, f"--junit-xml={inside}"]
    else:
        command = [*pytest, f"--junit-xml={report}"]
    variables_here = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    # Else every interpreter that the tests start compiles their modules anew.
    variables_here.pop("PYTHONDONTWRITEBYTECODE", None)
    # pytest takes its fixtures down on SIGINT, the lab its machine on SIGTERM.
    return process.run(
        command, cwd=ROOT, environment=variables_here, stop=signal.SIGTERM if stage.in_lab else signal.SIGINT
    )


def read_report(report: Path) -> Counts | None:
    """Read a JUnit XML report; None if there is none (pytest died, or collected nothing)."""
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        total = Counts(0, 0, 0)
        for suite in suites:
            tests, skipped = int(suite.get("tests", "0")), int(suite.get("skipped", "0"))
            failed = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
            total += Counts(max(0, tests - failed - skipped), failed, skipped)
    except (OSError, ElementTree.ParseError, ValueError):
        return None
    return total
