"""The rate of this host's time stamp counter, which QEMU's software CPU shows to its guests as theirs.

A kernel that QEMU emulates measures the rate against an emulated timer; on a busy host the measurement fails, and the
kernel does not boot. With `tsc_early_khz=` it is told instead (Linux, Documentation/admin-guide/kernel-parameters.txt).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_MEASURE_SECONDS = 0.02
_TRIES = 5


@functools.cache
def host_tsc_khz() -> int:
    """Measure the rate of the host's TSC, in kHz."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_READ_TSC)
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def both() -> tuple[int, int]:
        """Return TSC and nanoseconds, read as close together as several tries get them."""
        best = (1 << 63, 0, 0)
        for _ in range(_TRIES):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = int(read_tsc())
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            best = min(best, (after - before, ticks, (before + after) // 2))
        return best[1], best[2]

    first_ticks, first_time = both()
    time.sleep(_MEASURE_SECONDS)
    last_ticks, last_time = both()
    return round((last_ticks - first_ticks) * 1_000_000 / (last_time - first_time))
