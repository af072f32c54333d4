"""Block and pmem devices: what is stored, and how it is shown."""

from __future__ import annotations

import os
from typing import Any

BUCKET = {"size": 1000, "refill_time": 100}
SHOWN_BUCKET = {"size": 1000, "one_time_burst": None, "refill_time": 100}


def test_drives_are_shown_with_the_root_first(api, kernel):
    data = {"drive_id": "data", "is_root_device": False, "path_on_host": kernel, "is_read_only": True,
            "cache_type": "Writeback", "io_engine": "Async", "partuuid": None,
            "rate_limiter": {"bandwidth": BUCKET, "ops": {"size": 0, "refill_time": 1}}}  # fmt: skip
    root = {"drive_id": "root", "is_root_device": True, "path_on_host": kernel, "partuuid": "0-1"}
    backend = {"drive_id": "vub", "is_root_device": False, "socket": "s"}
    for drive in (data, root, backend):
        assert api.send("PUT", f"/drives/{drive['drive_id']}", drive) == (204, None)
    assert api.config()["drives"] == [
        {"drive_id": "root", "partuuid": "0-1", "is_root_device": True, "cache_type": "Unsafe", "is_read_only": False,
         "path_on_host": kernel, "rate_limiter": None, "io_engine": "Sync", "socket": None},
        {"drive_id": "data", "partuuid": None, "is_root_device": False, "cache_type": "Writeback",
         "is_read_only": True, "path_on_host": kernel, "rate_limiter": {"bandwidth": SHOWN_BUCKET, "ops": None},
         "io_engine": "Async", "socket": None},
        {"drive_id": "vub", "partuuid": None, "is_root_device": False, "cache_type": "Unsafe", "is_read_only": None,
         "path_on_host": None, "rate_limiter": None, "io_engine": None, "socket": "s"},
    ]  # fmt: skip
    assert list(api.config()["drives"][0])[-1] == "socket"


def test_there_is_one_root_device(api, kernel):
    def drive(name: str, root: bool) -> dict[str, Any]:
        return {"drive_id": name, "is_root_device": root, "path_on_host": kernel}

    def pmem(name: str, root: bool) -> dict[str, Any]:
        return {"id": name, "path_on_host": "x", "root_device": root}

    assert api.send("PUT", "/drives/a", drive("a", True))[0] == 204
    message = "Drive config error: A root block device already exists!"
    assert api.fault("PUT", "/drives/b", drive("b", True)) == message
    assert api.fault("PUT", "/pmem/p", pmem("p", True)) == (
        "Pmem config error: Attempt to add pmem as a root device while the root device defined as a block device"
    )
    assert api.send("PUT", "/drives/a", drive("a", True))[0] == 204  # the same one, once more
    assert api.send("PUT", "/drives/a", drive("a", False))[0] == 204
    assert api.send("PUT", "/pmem/p", pmem("p", True))[0] == 204
    assert api.send("PUT", "/pmem/p", pmem("p", True))[0] == 204
    assert api.fault("PUT", "/pmem/q", pmem("q", True)) == "Pmem config error: A root pmem device already exist"
    assert api.fault("PUT", "/drives/a", drive("a", True)) == message
    assert [drive["drive_id"] for drive in api.config()["drives"]] == ["a"]
    assert api.send("PUT", "/pmem/p", pmem("p", False))[0] == 204
    assert api.send("PUT", "/drives/b", drive("b", False))[0] == 204
    assert api.send("PUT", "/drives/b", drive("b", True))[0] == 204  # becomes the root device, and the first
    assert [drive["drive_id"] for drive in api.config()["drives"]] == ["b", "a"]


def test_a_drive_must_be_writable_unless_it_is_read_only(api, kernel, monkeypatch):
    opened: list[bool] = []

    def open_input(path: str, *, writable: bool) -> int:
        opened.append(writable)
        return os.open(path, os.O_RDONLY)

    monkeypatch.setattr("vmm.config.drives.open_input", open_input)
    for read_only in (None, False, True):
        body = {"drive_id": "a", "is_root_device": False, "path_on_host": kernel, "is_read_only": read_only}
        assert api.send("PUT", "/drives/a", body)[0] == 204
    assert opened == [True, True, False]
