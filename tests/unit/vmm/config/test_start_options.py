"""What the command line adds to the configuration."""

from __future__ import annotations

import os

import pytest

from vmm.cli import CommandLineError, parse
from vmm.config.start_options import StartOptions


def test_every_option_comes_from_its_flag(tmp_path):
    flags = "--boot-timer --unpack-kernel off --kernel-entry pvh --console pty --exerciser --mmds-size-limit 20"
    options = StartOptions.of(parse([*flags.split(), "--kernel-cache", str(tmp_path)]))
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    assert options == StartOptions(True, False, options.kernel_cache_fd, "pvh", "pty", True, 20, cpus)
    assert os.path.samestat(os.fstat(options.kernel_cache_fd), os.stat(tmp_path))
    assert not os.get_inheritable(options.kernel_cache_fd)
    os.close(options.kernel_cache_fd)


def test_without_flags():
    assert StartOptions.of(parse([])) == StartOptions(host_cpus=tuple(sorted(os.sched_getaffinity(0))))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--enable-pci"], "--enable-pci is not supported yet: start without it."),
        (["--kernel-cache", "/nix"], "--kernel-cache /nix: No such file or directory."),
        (["--kernel-cache", "/dev/null"], "--kernel-cache /dev/null: Not a directory."),
    ],
)
def test_what_is_refused(flags, text):
    with pytest.raises(CommandLineError) as error:
        StartOptions.of(parse(flags))
    assert str(error.value) == text
