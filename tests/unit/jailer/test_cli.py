"""The jailer's command line: parsing, help, and what values mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.version import FIRECRACKER_VERSION
from jailer import cli, settings, walls
from jailer.errors import ArgumentError

REQUIRED = ("--id", "a", "--exec-file", "f", "--uid", "1", "--gid", "2")


def test_version_is_the_controllers() -> None:
    assert cli.answer(["--version"]) == f"Jailer v{FIRECRACKER_VERSION}\n"


def test_every_flag_and_step_is_in_the_help() -> None:
    text = cli.answer(["-h"])
    assert text == cli.answer(["--id", "x", "--help"])
    assert text is not None
    for name in [*cli._FLAGS, *walls.SWITCHES]:
        assert name in text, name
    assert cli.answer(["--id", "x", "--", "--help"]) is None


def test_parse() -> None:
    options = cli.parse(
        [*REQUIRED, "--daemonize", "--cgroup", "a.b=1", "--cgroup", "c.d=2", "--", "--no-api", "--", "x"]
    )
    assert options.value("id") == "a"
    assert options.value("chroot-base-dir") == "/srv/jailer"
    assert options.switches == {"daemonize"}
    assert options.values_of("cgroup") == ("a.b=1", "c.d=2")
    assert options.values_of("without") == ()
    assert options.arguments == ("--no-api", "--", "x")


def test_check_and_purge_need_nothing_else() -> None:
    assert "check" in cli.parse(["--check"]).switches
    assert cli.parse(["--purge", "x"]).value("purge") == "x"


WORDS = st.one_of(st.sampled_from([*(f"--{name}" for name in cli._FLAGS), "--", "x", "", "-"]), st.text(max_size=5))


@given(st.lists(WORDS))
def test_any_command_line_is_parsed_or_refused(words: list[str]) -> None:
    try:
        cli.parse(words)
    except ArgumentError:
        pass


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("cpu.shares=10", ("cpu", "cpu.shares", "10")),
        ("hugetlb.2MB.max=1", ("hugetlb", "hugetlb.2MB.max", "1")),
        ("cgroup.max.depth=2", ("cgroup", "cgroup.max.depth", "2")),
    ],
)
def test_cgroup_items(text: str, item: tuple[str, str, str]) -> None:
    assert settings.parse_cgroup(text) == item


@pytest.mark.parametrize(
    "text", ["", "x", "a.b", "a.b=", "=1", "a.b=c=d", "a/b.c=1", ".b=1", "a.=1", "..=1", "a.b\0=1"]
)
def test_bad_cgroup_items(text: str) -> None:
    with pytest.raises(ArgumentError):
        settings.parse_cgroup(text)


def test_cgroups_of_workers_are_threaded_in_version_2() -> None:
    assert settings.parse_vcpu_cgroup("cpu.weight=10", 2) == ("cpu", "cpu.weight", "10")
    assert settings.parse_vcpu_cgroup("memory.limit_in_bytes=1", 1)[0] == "memory"
    with pytest.raises(ArgumentError, match=r"^--vcpu-cgroup memory.max=1: in cgroup version 2 the cgroup of a worker"):
        settings.parse_vcpu_cgroup("memory.max=1", 2)
    with pytest.raises(ArgumentError, match=r"Invalid format for cgroups: cpu\.weight"):
        settings.parse_vcpu_cgroup("cpu.weight", 2)


def test_limits() -> None:
    assert settings.parse_limits(()) == (2048, None)
    assert settings.parse_limits(("fsize=5", "no-file=6", "no-file=7")) == (7, 5)
    for item in ("fsize=-1", "fsize=", "no-file=1.5", "fsize=99999999999999999999", "nofile=1", "fsize=1=2", "fsize=²"):
        with pytest.raises(ArgumentError):
            settings.parse_limits((item,))


@pytest.mark.parametrize("microvm_id", ["a", "A-1", "-", "x" * 64])
def test_good_ids(microvm_id: str) -> None:
    settings.check_id(microvm_id)


@pytest.mark.parametrize("microvm_id", ["", "x" * 65, "a_b", "a.b", "ä", "a b", "²"])
def test_bad_ids(microvm_id: str) -> None:
    with pytest.raises(ArgumentError, match="Invalid instance ID"):
        settings.check_id(microvm_id)


def test_exec_file(tmp_path: Path) -> None:
    launcher = tmp_path / "fire"
    launcher.write_bytes(b"#!/x\n# cellblock-launcher\n")
    link = tmp_path / "link"
    link.symlink_to(launcher)
    assert settings.check_exec_file(str(link)) == str(launcher)
    launcher.write_bytes(b" " * 1010 + b"cellblock-launcher")  # the marker ends beyond the first KiB
    with pytest.raises(ArgumentError, match="not a Cellblock launcher"):
        settings.check_exec_file(str(launcher))
    with pytest.raises(ArgumentError, match="is not a file"):
        settings.check_exec_file(str(tmp_path))


def test_resolve(tmp_path: Path) -> None:
    launcher = tmp_path / "my-vmm"
    launcher.write_bytes(b"cellblock-launcher")
    words = ["--id", "a", "--exec-file", str(launcher), "--uid", "1", "--gid", "+2", "--chroot-base-dir", str(tmp_path)]
    resolved = settings.resolve(cli.parse(words))
    assert resolved.jail_root == f"{tmp_path}/my-vmm/a/root"
    assert (resolved.uid, resolved.gid) == (1, 2)
    assert (resolved.parent_cgroup, resolved.parent_cgroup_given) == ("my-vmm", False)
    resolved = settings.resolve(cli.parse([*words, "--parent-cgroup", "x//y/", "--cgroup-version", "2"]))
    assert (resolved.parent_cgroup, resolved.parent_cgroup_given, resolved.cgroup_version) == ("x/y", True, 2)
