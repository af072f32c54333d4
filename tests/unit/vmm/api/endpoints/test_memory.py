"""The balloon, and the memory that it is a part of."""

from __future__ import annotations


def test_get_balloon(api):
    balloon = {"amount_mib": 1, "deflate_on_oom": True}
    assert api.send("PUT", "/balloon", balloon)[0] == 204
    status, shown = api.send("GET", "/balloon")
    assert status == 200
    assert list(shown.items()) == [
        ("amount_mib", 1), ("deflate_on_oom", True), ("stats_polling_interval_s", 0), ("free_page_hinting", False),
        ("free_page_reporting", False),
    ]  # fmt: skip
    assert api.config()["balloon"] == shown


def test_memory_may_not_become_smaller_than_the_balloon(api):
    assert api.send("PUT", "/balloon", {"amount_mib": 100, "deflate_on_oom": True})[0] == 204
    message = (
        "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size."
    )
    assert api.fault("PATCH", "/machine-config", {"mem_size_mib": 99}) == message
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": 100})[0] == 204
