"""The exception tree of ``vmm``: stable ``code``, a text that says what happened and what to do."""

from __future__ import annotations

from base.errors import CellblockError


class VmmError(CellblockError):
    """Base of every error of the controller; its text is what API clients get as ``fault_message``."""

    code = "vmm"


class DeviceError(VmmError):
    """A device could not be made or attached."""

    code = "vmm.device"


class WorkerError(VmmError):
    """A worker did not do what it was asked to: it failed, died, or did not answer in time."""

    code = "vmm.worker"


class DeviceCellError(VmmError):
    """A device cell did not do what it was asked to: it failed, died, refused, or did not answer in time."""

    code = "vmm.device_cell"


class SupervisorError(VmmError):
    """The supervisor refused a request or is gone."""

    code = "vmm.supervisor"


class MicrovmEndedError(VmmError):
    """The microVM ended while an operation was going on."""

    code = "vmm.ended"


class StateError(VmmError):
    """The operation is not possible in the state that the microVM is in."""

    code = "vmm.state"
