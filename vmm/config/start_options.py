"""What the command line adds to the configuration."""

from __future__ import annotations

import os

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.cli import CONSOLES, DEFAULT_PAYLOAD_LIMIT, KERNEL_ENTRIES, CommandLineError

if TYPE_CHECKING:
    from vmm.cli import CommandLine


class StartOptions(NamedTuple):
    """What the command line adds to the configuration; the API does not change it.

    ``kernel_entry`` and ``console`` are choices of ``vmm.cli``; ``kernel_cache_fd`` is a directory descriptor, or -1.
    """

    boot_timer: bool = False
    unpack_kernel: bool = True
    kernel_cache_fd: int = -1
    kernel_entry: str = KERNEL_ENTRIES[0]
    console: str = CONSOLES[0]
    exerciser: bool = False
    #: Bytes of the metadata service's content.
    mmds_size_limit: int = DEFAULT_PAYLOAD_LIMIT
    #: The host's CPUs that this process may use, in ascending order; empty: not known.
    host_cpus: tuple[int, ...] = ()
    #: Of the launch plan: names this run of the host's kernel.
    boot_id: bytes = b""

    @staticmethod
    def of(line: CommandLine) -> StartOptions:
        """Return what a command line asks for, with the kernel cache open. Raises CommandLineError."""
        if line.enable_pci:
            raise CommandLineError("--enable-pci is not supported yet: start without it.")
        cache = -1
        if line.kernel_cache is not None:
            try:
                cache = os.open(line.kernel_cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise CommandLineError(f"--kernel-cache {line.kernel_cache}: {error.strerror}.") from None
        return StartOptions(
            line.boot_timer,
            line.unpack_kernel,
            cache,
            line.kernel_entry,
            line.console,
            line.exerciser,
            line.mmds_size_limit,
            tuple(sorted(os.sched_getaffinity(0))),
        )
