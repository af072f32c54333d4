"""Network interfaces: what is stored, and how it is shown."""

from __future__ import annotations

TAP = "Network config error: Could not create the network device: Open tap device failed: "


def test_network_interfaces_must_not_share_anything(api):
    first = {"iface_id": "a", "host_dev_name": "t0", "guest_mac": "AA:BB:CC:DD:EE:FF"}
    assert api.send("PUT", "/network-interfaces/a", first)[0] == 204
    same_mac = {"iface_id": "b", "host_dev_name": "t1", "guest_mac": "aa:bb:cc:dd:ee:ff"}
    message = "Network config error: The MAC address is already in use: aa:bb:cc:dd:ee:ff"
    assert api.fault("PUT", "/network-interfaces/b", same_mac) == message
    same_device = {"iface_id": "b", "host_dev_name": "t0"}
    assert api.fault("PUT", "/network-interfaces/b", same_device) == (
        f"{TAP}Error while creating ifreq structure: Resource busy (os error 16). Invalid TUN/TAP Backend provided by "
        "t0. Check our documentation on setting up the network devices."
    )
    assert api.send("PUT", "/network-interfaces/a", {**first, "mtu": 9000})[0] == 204
    assert api.config()["network-interfaces"] == [
        {"iface_id": "a", "host_dev_name": "t0", "guest_mac": "aa:bb:cc:dd:ee:ff", "mtu": 9000,
         "rx_rate_limiter": None, "tx_rate_limiter": None}
    ]  # fmt: skip


def test_an_interface_that_is_replaced_goes_to_the_end(api):
    for name in ("a", "b", "c", "a", "a"):
        body = {"iface_id": name, "host_dev_name": f"t{name}"}
        assert api.send("PUT", f"/network-interfaces/{name}", body)[0] == 204
    assert [interface["iface_id"] for interface in api.config()["network-interfaces"]] == ["c", "b", "a"]
