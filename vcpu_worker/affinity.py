"""Binds the worker's threads to host CPUs, before the worker is sealed: its filter has no sched_setaffinity(2).

The thread of a vCPU gets that vCPU's CPUs. The others (control, messages, ghosts) get the CPUs of all vCPUs of the
worker, by inheritance: the control thread is bound before it makes any other.
"""

from __future__ import annotations

import os

from base.lean_typing import Sequence
from vcpu_worker.errors import WorkerError


class AffinityError(WorkerError):
    """The host does not let this cell use a CPU that it is to use."""

    code = "worker.affinity"


def bind(cpus: Sequence[int], vcpus: Sequence[int]) -> None:
    """Let the calling thread run on these host CPUs only. Raises AffinityError if one of them is not to be had.

    ``vcpus``, whose CPUs these are, is for the error's text. The kernel leaves out what a cpuset forbids without saying
    so: it is read back.
    """
    try:
        os.sched_setaffinity(0, cpus)
        lacking = sorted(set(cpus) - os.sched_getaffinity(0))
    except (OSError, ValueError):  # none of them exists or is allowed; too large for the kernel's masks
        lacking = sorted(cpus)
    if lacking:
        whose, what = (", ".join(map(str, numbers)) for numbers in (vcpus, lacking))
        raise AffinityError(f"vCPU {whose}: host CPU {what} may not be used by this microVM")
