"""The command line of the controller: flags, defaults, errors, and what --version costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from base import exit_codes
from vmm import cli
from vmm.cli import CommandLine, CommandLineError, answer, parse

ROOT = Path(__file__).resolve().parents[3]
HELP = " \n\nFor more information try --help."


def test_defaults():
    line = parse([])
    assert line.api_sock == "/run/firecracker.socket"
    assert line.id == "anonymous-instance"
    assert line.http_api_max_payload_size == line.mmds_size_limit == 51200
    assert line.unpack_kernel
    assert (line.kernel_entry, line.console) == ("auto", "stdio")
    for name in ("no_api", "show_level", "show_log_origin", "boot_timer", "enable_pci", "no_seccomp", "exerciser"):
        assert getattr(line, name) is False
    names = ("config_file", "metadata", "log_path", "level", "module", "metrics_path", "seccomp_filter", "kernel_cache",
             "start_time_us", "start_time_cpu_us", "parent_cpu_time_us", "dump_cpu_config")  # fmt: skip
    for name in names:
        assert getattr(line, name) is None
    assert "api_sock='/run/firecracker.socket'" in repr(line)


def test_every_flag():
    line = parse(
        "--id abc-1 --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 --api-sock s --config-file f "
        "--no-api --metadata m --log-path l --level dEbUg --module x --show-level --show-log-origin --metrics-path p "
        "--boot-timer --http-api-max-payload-size 10 --mmds-size-limit +20 --enable-pci --no-seccomp "
        "--unpack-kernel off --kernel-cache c --kernel-entry pvh --console pty --exerciser --dump-cpu-config d "
        "--wall-log w --without a,b".split()
    )
    expected = {
        "id": "abc-1", "start_time_us": 1, "start_time_cpu_us": 2, "parent_cpu_time_us": 3, "api_sock": "s",
        "config_file": "f", "no_api": True, "metadata": "m", "log_path": "l", "level": "debug", "module": "x",
        "show_level": True, "show_log_origin": True, "metrics_path": "p", "boot_timer": True,
        "http_api_max_payload_size": 10, "mmds_size_limit": 20, "enable_pci": True, "no_seccomp": True,
        "seccomp_filter": None, "snapshot_version": False, "describe_snapshot": None, "unpack_kernel": False,
        "kernel_cache": "c", "kernel_entry": "pvh", "console": "pty", "exerciser": True, "dump_cpu_config": "d",
        "wall_log": "w", "without": "a,b",
    }  # fmt: skip
    assert {name: getattr(line, name) for name in CommandLine.__slots__} == expected


def test_what_follows_a_separator_is_not_ours():
    assert parse(["--id", "a", "--", "--nonsense"]).id == "a"
    assert answer(["--", "--version"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--foo", "Found argument 'foo' which wasn't expected, or isn't valid in this context."),
        ("foo", "Found argument 'foo' which wasn't expected, or isn't valid in this context."),
        ("--id a b", "Found argument 'b' which wasn't expected, or isn't valid in this context."),
        ("--id=a", "Found argument 'id=a' which wasn't expected, or isn't valid in this context."),
        ("--id", "The argument 'id' requires a value, but none was supplied."),
        ("--id --no-api", "The argument 'id' requires a value, but none was supplied."),
        ("--id a --id b", "The argument 'id' was provided more than once."),
        ("--boot-timer --boot-timer", "The argument 'boot-timer' was provided more than once."),
        ("--no-api", "Argument 'config-file' required, but not found."),
        ("--dump-cpu-config d", "Argument 'config-file' required, but not found."),
        ("--no-seccomp --seccomp-filter f",
         "Argument 'no-seccomp' cannot be used together with argument 'seccomp-filter'."),
        ("--start-time-us x", f"The value 'x' of argument 'start-time-us' is not a number from 0 to {(1 << 64) - 1}."),
        ("--http-api-max-payload-size -1",
         f"The value '-1' of argument 'http-api-max-payload-size' is not a number from 0 to {(1 << 64) - 1}."),
        ("--mmds-size-limit 18446744073709551616",
         f"The value '18446744073709551616' of argument 'mmds-size-limit' is not a number from 0 to {(1 << 64) - 1}."),
        ("--kernel-entry bios", "The value 'bios' of argument 'kernel-entry' is not one of: auto, pvh, linux64."),
        ("--unpack-kernel no", "The value 'no' of argument 'unpack-kernel' is not one of: on, off."),
    ],
)  # fmt: skip
def test_argument_errors(arguments, message):
    with pytest.raises(CommandLineError) as error:
        parse(arguments.split())
    assert str(error.value) == f"Arguments parsing error: {message}{HELP}"
    assert error.value.exit_code == exit_codes.ARGUMENT_PARSING


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "Invalid len (0);  the length must be between 1 and 64"),
        ("a" * 65, "Invalid len (65);  the length must be between 1 and 64"),
        ("ab_c", "Invalid char (_) at position 2"),
        ("é", "Invalid char (é) at position 0"),
    ],
)
def test_instance_id(value, message):
    with pytest.raises(CommandLineError) as error:
        parse(["--id", value])
    assert str(error.value) == f"Invalid instance ID: {message}"
    assert parse(["--id", "a" * 64]).id == "a" * 64


def test_log_level():
    with pytest.raises(CommandLineError) as error:
        parse(["--level", "loud"])
    assert error.value.exit_code == exit_codes.BAD_CONFIGURATION
    assert str(error.value) == (
        "Invalid value for logger level: Failed to parse string to level filter: loud."
        "Possible values: [Error, Warning, Info, Debug]"
    )


def test_answers(tmp_path):
    assert answer(["--version"]) == ("Firecracker v1.17.0-dev\n", 0)
    assert answer(["--nonsense", "--version"]) == ("Firecracker v1.17.0-dev\n", 0)
    assert answer(["--snapshot-version"]) == ("v11.0.0\n", 0)
    assert answer(["--id", "a"]) is None
    for flag in ("--help", "-h"):
        text, code = answer([flag, "--version"]) or ("", -1)
        assert code == 0
        assert text.startswith("Firecracker v1.17.0-dev\n")
        for name in CommandLine.__slots__:
            assert f"--{name.replace('_', '-')}" in text
        assert text.index("Flags of Cellblock") < text.index("--unpack-kernel <on|off>")
    with pytest.raises(CommandLineError):
        answer(["--snapshot-version", "--foo"])


def test_describe_snapshot(tmp_path):
    missing = "Unable to open snapshot state file: No such file or directory (os error 2)"
    asked = answer(["--describe-snapshot", str(tmp_path / "nix")])
    assert asked == (f"When printing Snapshot Data format: {missing}\n", 1)
    (tmp_path / "state").write_bytes(b"x")
    text, code = answer(["--describe-snapshot", str(tmp_path / "state")]) or ("", 0)
    assert code == 1
    assert "Invalid data format version of snapshot file" in text


def test_exit_codes_agree_with_those_of_ipc():
    assert (cli.EXIT_OK, cli.EXIT_GENERIC) == (exit_codes.OK, exit_codes.GENERIC_ERROR)
    assert cli.EXIT_ARGUMENT_PARSING == exit_codes.ARGUMENT_PARSING
    assert cli.EXIT_BAD_CONFIGURATION == exit_codes.BAD_CONFIGURATION


def test_what_version_needs_is_little():
    """--version must not pay for the rest: no typing, no enum, nothing of ours but four small modules."""
    code = (
        f"import sys; before = set(sys.modules); sys.path.insert(0, {str(ROOT)!r})\n"
        "from vmm.cli import answer; print(answer(['--version'])); print(sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-IS", "-c", code], check=True, capture_output=True, text=True)
    answered, modules = run.stdout.splitlines()
    assert answered == "('Firecracker v1.17.0-dev\\n', 0)"
    assert modules == str(["__future__", "base", "base.errors", "base.version", "vmm", "vmm.cli", "vmm.errors"])
