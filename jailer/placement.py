"""Does this host do second-stage paging in hardware? Then every vCPU gets a worker of its own, else they share one.

KVM parameters: Documentation/admin-guide/kernel-parameters.txt (kvm-intel.ept, kvm-amd.npt). Read before the jail.
"""

from __future__ import annotations

import os

from base.lean_typing import NamedTuple
from ipc.launch_plan import PLACEMENT_GROUPED, PLACEMENT_SPLIT

_PARAMETERS = (("kvm_intel", "ept"), ("kvm_amd", "npt"))
MODULES = "/sys/module"


class Placement(NamedTuple):
    """``kind`` as in the launch plan, and why."""

    kind: str
    reason: str


def detect(modules: str = MODULES) -> Placement:
    """Decide by the parameters of the KVM modules; unknown means grouped."""
    for module, parameter in _PARAMETERS:
        try:
            with open(os.path.join(modules, module, "parameters", parameter), encoding="ascii") as file:
                value = file.read(8).strip()
        except (OSError, UnicodeDecodeError):
            continue
        if value in ("Y", "1"):
            return Placement(PLACEMENT_SPLIT, f"{module} has {parameter} on")
        return Placement(PLACEMENT_GROUPED, f"{module} has {parameter} off")
    return Placement(PLACEMENT_GROUPED, "no KVM module that tells of second-stage paging")
