"""/mmds and /mmds/config: content before and after the start, limits, interfaces."""

from __future__ import annotations

import pytest

from tests.harness.api import Api
from vmm.config.mmds import MmdsConfig
from vmm.config.resources import VmResources
from vmm.config.start_options import StartOptions

MMDS = {"network_interfaces": ["eth0"], "version": "V2"}


def test_mmds_endpoints(api):
    assert api.send("GET", "/mmds") == (200, {})
    assert api.fault("PATCH", "/mmds", {}) == "MMDS error: The MMDS data store is not initialized."
    assert api.send("PUT", "/mmds", {"b": 1, "a": {"c": "d"}}) == (204, None)
    assert api.raw("GET", "/mmds").endswith(b'\r\n\r\n{"a":{"c":"d"},"b":1}')
    assert api.send("PATCH", "/mmds", {"a": None}) == (204, None)
    assert api.send("GET", "/mmds/anything") == (200, {"b": 1})
    assert api.send("PUT", "/mmds", b"null") == (204, None)
    assert api.raw("GET", "/mmds").endswith(b"\r\n\r\n{}")
    assert api.send("PATCH", "/mmds", {"x": "y"}) == (204, None)  # null counts as content
    assert api.send("PUT", "/mmds", b'"text"') == (204, None)
    assert api.send("GET", "/mmds") == (200, "text")


def test_content_that_does_not_fit_gets_413(tmp_path):
    api = Api(str(tmp_path / "log"), VmResources(StartOptions(mmds_size_limit=20)))
    assert api.send("PUT", "/mmds", {"a": "x" * 12}) == (204, None)
    for method in ("PUT", "PATCH"):
        status, reply = api.send(method, "/mmds", {"a": "x" * 13})
        assert status == 413
        assert reply == {"fault_message": "MMDS limit exceeded error: The MMDS patch request doesn't fit."}
    assert "Received Error. Status code: 413 Payload too large. Message: MMDS limit exceeded error" in api.log()
    assert api.send("GET", "/mmds") == (200, {"a": "x" * 12})
    api.close()


@pytest.mark.parametrize("state", ["Running", "Paused"])
def test_after_the_start_only_a_network_interface_leads_to_the_data_store(running, state):
    running.send("PATCH", "/vm", {"state": state.replace("Running", "Resumed")})
    for method, body in (("PUT", {"a": 1}), ("PATCH", {"a": 1}), ("PUT", {"a": "x" * 60000})):
        assert running.fault(method, "/mmds", body) == "MMDS error: The MMDS data store is not initialized."
    assert running.send("GET", "/mmds") == (200, {})
    assert "deserializing the json body" in running.fault("PUT", "/mmds", b"{")


def test_with_an_interface_the_content_can_be_changed_after_the_start(running):
    running.session.resources.mmds_config = MmdsConfig("V2", ["eth0"], None, imds_compat=False)
    assert running.fault("PATCH", "/mmds", {"a": 1}) == "MMDS error: The MMDS data store is not initialized."
    assert running.send("PUT", "/mmds", {"a": 1}) == (204, None)
    assert running.send("PATCH", "/mmds", {"b": 2}) == (204, None)
    assert running.send("GET", "/mmds") == (200, {"a": 1, "b": 2})
    assert running.send("PUT", "/mmds", {"a": "x" * 60000})[0] == 413


def test_mmds_config_is_shown_with_its_interfaces_in_their_order(api):
    for name in ("a", "b", "c"):
        api.send("PUT", f"/network-interfaces/{name}", {"iface_id": name, "host_dev_name": f"t{name}"})
    assert api.config()["mmds-config"] is None
    config = {"network_interfaces": ["c", "a"], "version": "V2", "imds_compat": True}
    assert api.send("PUT", "/mmds/config", config)[0] == 204
    assert api.config()["mmds-config"] == {
        "version": "V2", "network_interfaces": ["a", "c"], "ipv4_address": "169.254.169.254", "imds_compat": True,
    }  # fmt: skip
    address = {"network_interfaces": ["b"], "version": "V2", "ipv4_address": "169.254.254.255"}
    assert api.send("PUT", "/mmds/config", address)[0] == 204
    assert api.config()["mmds-config"]["ipv4_address"] == "169.254.254.255"
