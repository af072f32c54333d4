"""An ordinary user for launches without root: its /dev/kvm is a node of its own, in a mount namespace of its own."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from jailer import syscalls
from tests.harness.jail import GID, UID, JailedMicrovm

_KVM = os.makedev(10, 232)


def become_user(
    base: Path, *, groups: Sequence[int] = (), kvm: bool = True, before: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Return what a child does to become the user; ``base`` is given to it. ``before`` is done while still root."""
    os.chown(base, UID, GID)
    node = base.parent / "kvm"
    if kvm and not node.exists():
        os.mknod(node, stat.S_IFCHR | 0o600, _KVM)
        os.chown(node, UID, GID)

    def become() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_SLAVE | syscalls.MS_REC)
        if kvm:
            syscalls.mount(str(node), "/dev/kvm", None, syscalls.MS_BIND)
        before()
        os.setgroups(groups)
        os.setresgid(GID, GID, GID)
        os.setresuid(UID, UID, UID)

    return become


def start_rootless(jailed: JailedMicrovm, **keywords: object) -> JailedMicrovm:
    """Start a jail as the ordinary user (UID, GID)."""
    jailed.wall_log.touch()
    os.chown(jailed.wall_log, UID, GID)
    for path in (jailed.directory.parent, jailed.directory, jailed.root, jailed.root / "kernel"):
        if path.exists():
            os.chown(path, UID, GID)
    return jailed.start(preexec_fn=become_user(jailed.base, **keywords))  # type: ignore[arg-type]
