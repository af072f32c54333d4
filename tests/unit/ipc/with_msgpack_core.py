"""A pytest plugin: from here on `import msgpack` means its core with our stand-ins, as in the programs."""

from __future__ import annotations

from ipc import msgpack_core

assert msgpack_core.install(), "the programs would load all of msgpack"
