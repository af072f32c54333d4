"""A pytest plugin: from here on `import zmq` means pyzmq's core with our stand-ins, as in the programs."""

from __future__ import annotations

from ipc import zmq_core

assert zmq_core.install(), "the programs would load all of pyzmq"
