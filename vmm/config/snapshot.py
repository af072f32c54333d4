"""Requests to create and to load snapshots: the shape of PUT /snapshot/create and PUT /snapshot/load."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from vmm.json.schema import BOOLEAN, PATH, STRING, Field, List, Object, Option, Variant

FULL = "Full"
DIFF = "Diff"
BACKEND_FILE = "File"
BACKEND_UFFD = "Uffd"
HUGE_PAGES_AS_SAVED = "Snapshot"


class CreateSnapshotParams(NamedTuple):
    """Body of PUT /snapshot/create."""

    snapshot_type: str
    snapshot_path: str
    mem_file_path: str


class NetworkOverride(NamedTuple):
    """Another host device for an interface of the snapshot."""

    iface_id: str
    host_dev_name: str


class MemoryBackend(NamedTuple):
    """Where guest memory comes from: a file, or a page-fault handler's socket."""

    backend_path: str
    backend_type: str


class LoadSnapshotParams(NamedTuple):
    """Body of PUT /snapshot/load. One of ``mem_file_path`` (deprecated) and ``mem_backend`` is set.

    ``vsock_override`` is another path for the socket of the vsock device.
    """

    snapshot_path: str
    mem_file_path: str | None
    mem_backend: MemoryBackend | None
    enable_diff_snapshots: bool
    track_dirty_pages: bool
    resume_vm: bool
    network_overrides: list[NetworkOverride]
    vsock_override: str | None
    clock_realtime: bool
    huge_pages: str

    @property
    def backend(self) -> MemoryBackend:
        """Where guest memory comes from, whichever field says it."""
        return self.mem_backend or MemoryBackend(self.mem_file_path or "", BACKEND_FILE)


CREATE_SNAPSHOT = Object(
    "CreateSnapshotParams",
    CreateSnapshotParams,
    Field("snapshot_type", Variant(DIFF, FULL), FULL),
    Field("snapshot_path", PATH),
    Field("mem_file_path", PATH),
)
_NETWORK_OVERRIDE = Object(
    "NetworkOverride",
    NetworkOverride,
    Field("iface_id", STRING),
    Field("host_dev_name", STRING),
    ignore_unknown=True,
)
_VSOCK_OVERRIDE = Object("VsockOverride", str, Field("uds_path", STRING), ignore_unknown=True)
_MEMORY_BACKEND = Object(
    "MemBackendConfig",
    MemoryBackend,
    Field("backend_path", PATH),
    Field("backend_type", Variant(BACKEND_FILE, BACKEND_UFFD)),
)
LOAD_SNAPSHOT = Object(
    "LoadSnapshotConfig",
    LoadSnapshotParams,
    Field("snapshot_path", PATH),
    Field("mem_file_path", Option(PATH)),
    Field("mem_backend", Option(_MEMORY_BACKEND)),
    Field("enable_diff_snapshots", BOOLEAN, False),
    Field("track_dirty_pages", BOOLEAN, False),
    Field("resume_vm", BOOLEAN, False),
    Field("network_overrides", List(_NETWORK_OVERRIDE), ()),
    Field("vsock_override", Option(_VSOCK_OVERRIDE)),
    Field("clock_realtime", BOOLEAN, False),
    Field("huge_pages", Variant(HUGE_PAGES_AS_SAVED, "None", "Transparent", "2M"), HUGE_PAGES_AS_SAVED),
)
