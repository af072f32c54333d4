"""The command line of ``cellblock overlay``, on real files."""

from __future__ import annotations

import fcntl
import json
import os

import pytest

from base.boot_id import read_boot_id
from cellblock import main as program
from cellblock.overlay.main import main
from virtio.block.overlay.file import open_overlay, read_overlay
from virtio.block.overlay.layout import PHASE_COMMIT
from virtio.block.overlay.storage import Storage

SIZE = 64 << 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(bytes(range(256)) * (SIZE // 256))
    return tmp_path


def run(capsys, *words):
    """Return (exit status, output, errors)."""
    status = main(["cellblock overlay", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def change(folder, cluster=1, *, flushed=True):
    """Do what a machine does: write a cluster."""
    fds = [os.open(folder / name, os.O_RDWR) for name in ("o", "base")]
    disk = Storage(fds[0])
    overlay = open_overlay(disk, Storage(fds[1]), read_boot_id())
    disk.write(overlay.geometry.data_offset + cluster * 4096, b"c" * 4096)
    overlay.add(cluster, 1)
    if flushed:
        overlay.flush()
    for fd in fds:
        os.close(fd)


def test_from_nothing_to_a_commit(folder, capsys):
    status, out, _ = run(capsys, "create", "o", "--base", "base")
    assert (status, out) == (0, "o: a drive of 64 KiB, 16 clusters of 4 KiB\n")
    change(folder)
    change(folder, 2, flushed=False)
    status, out, _ = run(capsys, "info", "o")
    assert status == 0
    assert "2 clusters, 8 KiB (12.5 %), 1 of them not flushed" in out
    facts = json.loads(run(capsys, "info", "o", "--json")[1])
    assert facts["clusters_in_overlay"] == 2
    assert facts["size"] == facts["base_size"] == SIZE
    assert facts["pending"] == "none"
    assert not facts["in_use"]
    status, out, _ = run(capsys, "check", "o", "--base", "base")
    assert (status, out.splitlines()[-1]) == (0, "o: sound, 2 of 16 clusters in it")
    assert "note: 1 clusters are not flushed" in out
    status, out, _ = run(capsys, "commit", "o", "--base", "base")
    assert (status, out) == (0, "base: 8 KiB from o, which is empty now\n")
    assert (folder / "base").read_bytes()[4096:12288] == b"c" * 8192
    assert run(capsys, "check", "o", "--base", "base")[:2] == (0, "o: sound, 0 of 16 clusters in it\n")


def test_rebase(folder, capsys):
    (folder / "new").write_bytes(b"n" * SIZE)
    run(capsys, "create", "o", "--base", "base")
    change(folder)
    assert run(capsys, "rebase", "o", "--base", "new", "--from", "base")[1] == (
        "o: over new; 60 KiB differ and are in the overlay now\n"
    )
    assert run(capsys, "check", "o", "--base", "new")[0] == 0
    (folder / "copy").write_bytes(b"n" * SIZE)
    assert run(capsys, "rebase", "o", "--base", "copy", "--same-content")[0] == 0


def test_what_is_wrong_is_said_with_the_file(folder, capsys):
    assert run(capsys, "info", "none")[2] == (
        "cellblock overlay: the overlay none cannot be opened: No such file or directory (os error 2)\n"
    )
    assert run(capsys, "info", "base")[2] == "cellblock overlay: the overlay base: not an overlay\n"
    assert "neither a regular file" in run(capsys, "info", "/dev/null")[2]
    assert "the overlay base: it is in use by another process" in run(capsys, "create", "base", "--base", "base")[2]
    assert "take larger ones" in run(capsys, "create", "o", "--base", "base", "--size", "2T", "--cluster-size", "4K")[2]
    assert not (folder / "o").exists()
    run(capsys, "create", "o", "--base", "base")
    assert "is not empty" in run(capsys, "create", "o", "--base", "base")[2]
    (folder / "base").write_bytes(b"x" * SIZE)
    status, out, _ = run(capsys, "check", "o", "--base", "base")
    assert (status, "its base has changed" in out) == (1, True)
    assert "its base has changed" in run(capsys, "commit", "o", "--base", "base")[2]


def test_what_is_in_use_is_left_alone(folder, capsys):
    run(capsys, "create", "o", "--base", "base")
    used = os.open("o", os.O_RDWR)
    fcntl.flock(used, fcntl.LOCK_EX)
    assert "the overlay o: it is in use by another process" in run(capsys, "commit", "o", "--base", "base")[2]
    assert json.loads(run(capsys, "info", "o", "--json")[1])["in_use"]
    os.close(used)
    used = os.open("base", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_SH)
    assert "the base base: it is in use by another process" in run(capsys, "commit", "o", "--base", "base")[2]
    assert run(capsys, "check", "o", "--base", "base")[0] == 0
    os.close(used)


def test_an_unfinished_commit_is_told(folder, capsys):
    run(capsys, "create", "o", "--base", "base")
    fd = os.open("o", os.O_RDWR)
    read_overlay(Storage(fd), b"").change(PHASE_COMMIT)
    os.close(fd)
    status, out, _ = run(capsys, "check", "o")
    assert (status, "a commit of it was begun" in out) == (1, True)
    assert "pending:        commit" in run(capsys, "info", "o")[1]
    assert run(capsys, "commit", "o", "--base", "base")[0] == 0
    assert run(capsys, "check", "o")[0] == 0


def test_what_was_not_flushed_can_be_dropped(folder, capsys):
    run(capsys, "create", "o", "--base", "base")
    change(folder)
    change(folder, 2, flushed=False)
    assert run(capsys, "check", "o", "--drop-volatile")[1] == "o: sound, 1 of 16 clusters in it\n"
    assert run(capsys, "check", "o")[1] == "o: sound, 1 of 16 clusters in it\n"


def test_a_copied_base_is_noted(folder, capsys):
    run(capsys, "create", "o", "--base", "base")
    os.utime("base", (1, 1))
    assert (
        "note: the base was written to, or copied, at 1970-01-01 00:00:01 UTC"
        in run(capsys, "check", "o", "--base", "base")[1]
    )


def test_sizes(folder, capsys):
    assert run(capsys, "create", "o", "--base", "base", "--size", "1M", "--cluster-size", "64k")[1] == (
        "o: a drive of 1 MiB, 16 clusters of 64 KiB\n"
    )
    for words in (
        ("--size", "big"),
        ("--size", ""),
        ("--cluster-size", "5000"),
        ("--cluster-size", "4M"),
        ("--size", "K"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(capsys, "create", "p", "--base", "base", *words)
        assert ended.value.code == 2
    for command in ("create", "info", "check", "commit", "rebase"):
        with pytest.raises(SystemExit) as ended:
            run(capsys, command, "--help")
        assert ended.value.code == 0


def test_the_program_knows_it(folder, capsys):
    assert program.main(["cellblock", "overlay", "create", "o", "--base", "base"]) == 0
    assert program.main(["cellblock", "overlay", "info", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("cellblock overlay: the overlay nothing")
