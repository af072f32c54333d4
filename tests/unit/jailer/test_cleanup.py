"""Removal of what a microVM leaves: no link is followed, nothing of others is taken."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from jailer import cleanup
from jailer.errors import CleanupError


def _remove(directory: Path, name: str) -> list[str]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return cleanup.remove_tree(descriptor, name)
    finally:
        os.close(descriptor)


def test_a_tree_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").touch()
    (tree / "a/link").symlink_to(outside)
    (tree / "up").symlink_to("..")
    os.mkfifo(tree / "fifo")
    assert _remove(tmp_path, "tree") == []
    assert _remove(tmp_path, "tree") == []  # gone already
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert os.listdir(outside) == ["file"]


def test_a_link_in_place_of_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "tree").symlink_to(outside)
    assert _remove(tmp_path, "tree") == []
    assert os.listdir(tmp_path) == ["outside"]


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path
    for _ in range(cleanup.MAX_DEPTH + 2):
        path = path / "d"
        path.mkdir()
    failures = _remove(tmp_path, "d")
    assert len(failures) == 1
    assert "nested too deeply" in failures[0]


def test_shared_directories_are_removed_only_when_empty(tmp_path: Path) -> None:
    (tmp_path / "shared/other").mkdir(parents=True)
    item = cleanup.leftover(str(tmp_path / "shared"), only_empty=True)
    assert cleanup.remove_all([item]) == []
    assert (tmp_path / "shared/other").exists()
    (tmp_path / "shared/other").rmdir()
    assert cleanup.remove_all([item]) == []
    assert not (tmp_path / "shared").exists()
    os.close(item.parent)


def test_a_busy_cgroup_is_reported(tmp_path: Path) -> None:
    (tmp_path / "group/member").mkdir(parents=True)  # ENOTEMPTY instead of EBUSY: not waited for
    item = cleanup.leftover(str(tmp_path / "group"), is_cgroup=True)
    failures = cleanup.remove(item, time.monotonic())
    assert failures == [f"{tmp_path}/group: Directory not empty (os error 39)"]
    os.close(item.parent)


@pytest.mark.parametrize("link", ["root", "root/vmm.pid"])
def test_purge_follows_no_link_to_a_pid_file(tmp_path: Path, link: str) -> None:
    """The directory may belong to the microVM's user; what another file says is not told, and its lock is nothing."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/vmm.pid").write_text("secret")
    jail = tmp_path / "jail"
    (jail / link).parent.mkdir(parents=True)
    target = "outside" if link == "root" else "outside/vmm.pid"
    (jail / link).symlink_to(tmp_path / target)
    with (tmp_path / "outside/vmm.pid").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CleanupError, match=r"Failed to open file .*: Symbolic link loop \(os error 40\)"):
            cleanup.purge(str(jail), "vmm", "no-such-parent/no-such-id")


def test_purge_says_no_more_than_a_number(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/vmm.pid").write_text("\033[2J")
    with (tmp_path / "root/vmm.pid").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CleanupError, match=r"is still running \(pid unknown as"):
            cleanup.purge(str(tmp_path), "vmm", "no-such-parent/no-such-id")
