"""The exception tree of ``vcpu_worker``. ``code`` is stable and travels in ``Failed`` messages."""

from __future__ import annotations

import os

from base.errors import CellblockError


class WorkerError(CellblockError):
    """Base of every error that this package raises: what happened and what to do about it."""

    code = "worker"


class KvmError(WorkerError):
    """A KVM ioctl failed. ``operation`` is its name in the kernel's API, ``errno`` the kernel's answer."""

    code = "worker.kvm"

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        text = f"{operation}: {os.strerror(errno)} (os error {errno})"
        super().__init__(f"{text}; {hint}" if hint else text)
        self.operation = operation
        self.errno = errno


class CapabilityError(WorkerError):
    """The host's KVM lacks something that every microVM needs; another host or kernel is necessary."""

    code = "worker.capability"


class MsrError(WorkerError):
    """A model specific register that the guest needs could not be read or written."""

    code = "worker.msr"


class TemplateError(WorkerError):
    """The CPU template asks for what this host's KVM does not have."""

    code = "worker.template"


class ConfigurationError(WorkerError):
    """A command does not fit: wrong values, wrong descriptors, or descriptors missing."""

    code = "worker.configuration"


class StateError(WorkerError):
    """A command came in a state that does not allow it (for example SaveState while running)."""

    code = "worker.state"
