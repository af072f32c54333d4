"""The messages of the control channels. docs/formats/messages.md; numbers are never given twice.

``WORKER``: controller ↔ worker, over ZeroMQ. ``SUPERVISOR``: controller ↔ supervisor, over an inherited socket pair.
``DESCRIPTORS``: controller → worker, over another. These modules are loaded together, so that a schema is complete
wherever it is used. ``device`` has the same two of a device cell, and is loaded where there is one.
"""

from ipc.messages import descriptors, ghosts, records, replacement, supervisor, vm, worker

__all__ = ["descriptors", "ghosts", "records", "replacement", "supervisor", "vm", "worker"]
