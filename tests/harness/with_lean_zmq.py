"""A pytest plugin: from here on `import zmq` means pyzmq's core with our stand-ins, as in the programs."""

from __future__ import annotations

from base import lean_zmq

assert lean_zmq.install(), "the programs would load all of pyzmq"
