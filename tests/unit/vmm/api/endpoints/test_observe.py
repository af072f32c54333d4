"""The log that a client sets up, and the metrics for Prometheus."""

from __future__ import annotations

import pytest

from tests.harness.api import parse_response


def test_put_logger_may_be_repeated(api, tmp_path):
    for number in range(3):
        body = {"log_path": str(tmp_path / f"log{number}"), "level": "warning", "show_level": True}
        assert api.send("PUT", "/logger", body)[0] == 204
        api.fault("GET", "/foo")
        lines = (tmp_path / f"log{number}").read_text().splitlines()
        assert len(lines) == 1  # the lines at level Info are gone
        assert ":ERROR] Received Error." in lines[0]


@pytest.mark.parametrize("state", ["Not started", "Running", "Paused"])
def test_the_exposition_can_be_had_in_every_state(api, kernel, state):
    if state != "Not started":
        api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
        api.send("PUT", "/actions", {"action_type": "InstanceStart"})
    if state == "Paused":
        api.send("PATCH", "/vm", {"state": "Paused"})
    status, text, headers = parse_response(api.raw("GET", "/metrics/prometheus"))
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert f'state="{state}"' in text
