"""A pytest plugin: from here on `import msgpack` means its core with our stand-ins, as in the programs."""

from __future__ import annotations

from base import lean_msgpack

assert lean_msgpack.install(), "the programs would load all of msgpack"
