"""What can be observed, and where it goes: /logger, /metrics, /metrics/prometheus and /events."""

from __future__ import annotations

from vmm.api.endpoints.table import Endpoint
from vmm.observe.logger import LOGGER_CONFIG
from vmm.observe.metrics import METRICS_CONFIG

# What these two answer is no JSON: vmm.api.dispatch does.
EXPOSITION = Endpoint("GET", "metrics/prometheus", None, None, None)
EVENT_STREAM = Endpoint("GET", "events", None, None, None)

ENDPOINTS = (
    Endpoint(
        "PUT", "logger", LOGGER_CONFIG, lambda session, _id, config: session.logger.configure(config), None,
        "Logger error", counted="logger", section="logger",
    ),
    Endpoint(
        "PUT", "metrics", METRICS_CONFIG, lambda session, _id, config: session.metrics.configure(config), None,
        "Metrics error", counted="metrics", section="metrics",
    ),
    EXPOSITION,
    EVENT_STREAM,
)  # fmt: skip
