"""Drills: a cell attacks its own walls, so that a test sees them hold. Armed by the jailer (``--drill``), else inert.

Each attack reports on standard error what came of it, unless a wall ended the cell before it could. A file per kind;
``ATTEMPTS`` of each has name → attack (``--drill NAME``), ``AIMED`` those that take a target (``--drill NAME=TARGET``).
An attempt returns what it could do, or raises OSError with what it was refused by.
"""

from __future__ import annotations

import os
import time

from base.lean_typing import Callable
from ipc.drills import (
    confinement,
    descriptors,
    files,
    floods,
    kernel,
    memory,
    network,
    peers,
    privileges,
    processes,
    sockets,
    storage,
)
from ipc.launch_plan import (
    ROLE_DEVICE,
    ROLE_RUNNING_DEVICE,
    ROLE_RUNNING_VCPU,
    ROLE_SUPERVISOR,
    ROLE_VCPU,
    ROLE_VMM,
)

KINDS = (
    processes, peers, files, confinement, sockets, network, memory, kernel, privileges, descriptors, storage, floods,
)  # fmt: skip
ATTEMPTS: dict[str, Callable[[], str]] = {name: attempt for kind in KINDS for name, attempt in kind.ATTEMPTS.items()}
AIMED: dict[str, Callable[[str], str]] = {name: attempt for kind in KINDS for name, attempt in kind.AIMED.items()}
_ROLES = (ROLE_VCPU, ROLE_RUNNING_VCPU, ROLE_VMM, ROLE_SUPERVISOR, ROLE_DEVICE, ROLE_RUNNING_DEVICE)


def check(specifications: tuple[str, ...]) -> None:
    """Raise ValueError unless every specification is ``NAME``, ``NAME=TARGET`` or one of them with ``ROLE:`` before it.

    The role is vcpu (the default), vcpu-running, vmm, supervisor, device or device-running.
    """
    for specification in specifications:
        role, name = _parse(specification)
        aimed, separator, target = name.partition("=")
        known = aimed in AIMED and bool(target) if separator else name in ATTEMPTS
        if not known or role not in _ROLES:
            names = ", ".join((*ATTEMPTS, *(f"{each}=TARGET" for each in AIMED)))
            roles = " or ".join(f"{each}:" for each in _ROLES[1:])
            raise ValueError(f"--drill {specification}: a drill is one of {names}, or {roles} and one of them")


def _parse(specification: str) -> tuple[str, str]:
    role, separator, name = specification.partition(":")
    return (role, name) if separator and role in _ROLES else (ROLE_VCPU, specification)


def _attack(name: str) -> str:
    aimed, separator, target = name.partition("=")
    return AIMED[aimed](target) if separator else ATTEMPTS[name]()


def run(specifications: tuple[str, ...], role: str) -> None:
    """Carry out the drills that are armed for this role: a worker or device cell at its setup, or when that is over."""
    for specification in specifications:
        wanted, name = _parse(specification)
        if wanted != role:
            continue
        try:
            outcome = f"succeeded ({_attack(name)})"
        except OSError as error:
            outcome = f"refused: {error.strerror} ({error.errno})"
        _report(f"drill {name}: {outcome}\n".encode())


def _report(line: bytes) -> None:
    while True:
        try:
            os.write(2, line)
            return
        except BlockingIOError:
            time.sleep(0.01)  # a drill has filled the pipe
