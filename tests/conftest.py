"""What every test shares: tiers, counts, seeds, the guest image, the check for left-overs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devtool.testing import has_hardware_paging
from tests.harness.leftovers import Leftovers
from tests.harness.run_options import IN_LAB, SEED, SOAK, NoLeftovers, Scale

if TYPE_CHECKING:
    from lab.guest_disk import GuestDisk
    from lab.guest_image import GuestImage

_LAB_TESTS = Path(__file__).resolve().parent / "lab"

if not IN_LAB:  # importing it takes many seconds of the emulated machine, and no lab test uses it
    import hypothesis

    hypothesis.settings.register_profile(
        "cellblock",
        deadline=None,  # a busy machine is no error
        derandomize=not SOAK,
        database=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("cellblock")


def _soak_names(item: pytest.Item) -> set[str]:
    """Return the soaks that a test takes part in."""
    names: set[str] = set()
    for mark in item.iter_markers("soak"):
        names.update(mark.args)
    return names


def _runs_at_full_count(item: pytest.Item) -> bool:
    names = _soak_names(item)
    return bool(SOAK) and bool(names) and (SOAK == "all" or SOAK in names)


def pytest_report_header() -> str:
    """Say what a failing run needs to be repeated."""
    where = "in the lab" if IN_LAB else "on the host"
    return f"cellblock: seed {SEED} (CELLBLOCK_SEED), soak {SOAK or 'none'}, {where}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose what runs here: soaks by name, Linux guests only where they can run."""
    can_run_linux = IN_LAB or has_hardware_paging()
    chosen: list[pytest.Item] = []
    rest: list[pytest.Item] = []
    for item in items:
        if item.path.is_relative_to(_LAB_TESTS):
            item.add_marker(pytest.mark.lab)
        only_soak = any(mark.kwargs.get("only") for mark in item.iter_markers("soak"))
        wanted = _runs_at_full_count(item) if SOAK or only_soak else True
        if item.get_closest_marker("lab") and not can_run_linux:
            wanted = False  # ./dev test runs these in the lab
        (chosen if wanted else rest).append(item)
    if rest:
        config.hook.pytest_deselected(items=rest)
        items[:] = chosen


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """Return a function (reduced, full) → the count to use: full only under ./dev test --soak NAME."""
    full_count = _runs_at_full_count(request.node)
    return lambda reduced, full: full if full_count else reduced


@pytest.fixture
def seed() -> int:
    """Return the seed for the test's random choices: fixed, or CELLBLOCK_SEED."""
    return SEED


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Let the controller's log, in this process, go to a file; return a function that reads it."""
    from vmm.observe.logger import LOG

    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    LOG.use_descriptor(descriptor)
    yield path.read_text
    LOG.close()
    os.close(descriptor)


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Return a bootable Debian kernel and initramfs (built at most once, then cached outside the tree)."""
    from lab.guest_image import ensure

    return ensure()


@pytest.fixture(scope="session")
def debian_disk(tmp_path_factory: pytest.TempPathFactory) -> GuestDisk:
    """Return a disk with a Debian root file system, to copy: where copies cost least, near the jails (see copy_to)."""
    from lab.guest_disk import ensure

    disk = ensure()
    # In the lab the cache is read over 9p, once; after that copies go from memory to memory.
    return disk._replace(path=disk.copy_to(tmp_path_factory.mktemp("disk") / "root.ext4")) if IN_LAB else disk


@pytest.fixture
def no_leftovers() -> Iterator[NoLeftovers]:
    """Return a context manager: `with no_leftovers(directory, …, names=("vm-id",)):` fails if something stays behind.

    Watched are descendants of this process (orphans too), and what concerns the directories or names: mounts, files
    and sockets under the directories, cgroups and sockets with one of the names in their path.
    """
    yield Leftovers.watch
    sys.stdout.flush()
