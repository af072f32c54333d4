"""The network of the cells: an empty namespace for all of them, and descriptors that still reach the caller's TAPs.

network_namespaces(7). An open /dev/net/tun belongs to the network namespace of the process that opened it, for good
(tun_chr_open and tun_set_iff in the kernel's drivers/net/tun.c); who may attach it to which TAP is asked when that is
done, of whoever does it then.
"""

from __future__ import annotations

import errno
import os
import resource

from base.errno_text import errno_text
from base.lean_std import socket
from base.lean_typing import Callable
from ipc import descriptors
from ipc.errors import DescriptorError
from ipc.launch_plan import MAX_DEVICES, TunDescriptors
from jailer import syscalls
from jailer.errors import StepError
from jailer.operations import Operation, Step

TUN_DEVICE = "/dev/net/tun"
#: Of the limit on open files, what is above this is shared, one part in so many for TUN descriptors.
_FILES_KEPT = 64
_FILES_SHARE = 4
#: The frame that brings the namespace, supervisor → controller, on the controller's seal channel.
_NAMESPACE = b"network"
_OWN_NAMESPACE = "/proc/self/ns/net"


class JoinNetworkNamespace(Operation):
    """``--netns``: the controller stays in it; supervisor and workers leave it for an empty one later."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def describe(self) -> str:
        return f"join network namespace {self._path}"

    def do(self) -> None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StepError(f"Failed to open file {self._path}: {errno_text(error)}") from None
        try:
            syscalls.setns(descriptor, syscalls.CLONE_NEWNET)
        except OSError as error:
            raise StepError(f"Failed to join network namespace: netns: {errno_text(error)}") from None
        finally:
            os.close(descriptor)


def open_tun(device: str = TUN_DEVICE, directory: int | None = None) -> TunDescriptors:
    """Open as many as a machine may have devices, in the network namespace that we are in; fewer if files are few.

    A host without TUN is told of when an interface is configured. Raises nothing.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = MAX_DEVICES
    if limit != resource.RLIM_INFINITY:
        count = min(count, max(0, limit - _FILES_KEPT) // _FILES_SHARE)
    opened: tuple[int, ...] = ()
    while len(opened) < count:
        try:
            opened = (*opened, os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory))
        except OSError as error:
            return TunDescriptors(opened, error.errno or 0)
    return TunDescriptors(opened)


class OpenTun(Operation):
    """In the controller's process: TUN descriptors, by the host's node or, where there is none, by the jail's own."""

    __slots__ = ("_directory", "opened")

    def __init__(self, directory: Callable[[], int]) -> None:
        """Open them by the host's node; ``directory`` returns the one that the jail's is in, once that is made."""
        self._directory = directory
        self.opened = open_tun()

    def describe(self) -> str:
        return "open TUN descriptors"

    def do(self) -> None:
        if self.opened.error == errno.ENOENT:  # the host may have the driver all the same
            self.opened = open_tun(os.path.basename(TUN_DEVICE), self._directory())


def leave_network() -> None:
    """Enter a new, empty network namespace: a loopback device that is down, nothing else. Raises StepError."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
    except OSError as error:
        raise StepError(f"Failed to unshare into new network namespace: {errno_text(error)}") from None


def share_network(controller: socket.socket) -> None:
    """In the supervisor: hand the namespace that we are in to the controller. Raises StepError.

    It is made while the controller makes its jail, since that takes as long.
    """
    with Step("open the network namespace of the cells"):
        namespace = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        descriptors.send(controller, _NAMESPACE, (namespace,))
    except DescriptorError as error:
        if not isinstance(error.__context__, ConnectionError):
            raise StepError(f"Failed to hand the network namespace to the controller: {error}") from None
        # It has ended, and has said why (jailer.start.wait_entered).
    finally:
        os.close(namespace)


def join_network(supervisor: socket.socket) -> None:
    """In the controller, with privileges: enter the supervisor's namespace. Raises StepError, DescriptorError."""
    frame, owned = descriptors.receive(supervisor, 1)
    with owned:
        if frame != _NAMESPACE:
            raise StepError("Failed to join network namespace: the supervisor has none")
        namespace = owned.take()
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNET)
        except OSError as error:
            raise StepError(f"Failed to join network namespace: {errno_text(error)}") from None
        finally:
            os.close(namespace)
