"""Metrics in Prometheus' text exposition format (version 0.0.4), for GET /metrics/prometheus.

Counters are totals since the start of the process, whatever lines were written to the metrics file meanwhile. Devices
are told apart by the label ``id``; their sums are left to the reader, so the groups block, net and pmem do not appear.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from base.version import CELLBLOCK_VERSION
from vmm.observe.metrics import SUMMED_KINDS

if TYPE_CHECKING:
    from base.counters import Counters
    from vmm.observe.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "cellblock"
_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}


def exposition(metrics: Metrics, state: str) -> str:
    """Return all metrics; ``state`` is that of the microVM."""
    metrics.collect()
    families: dict[tuple[str, str], list[str]] = {}
    labels = _labels(id=metrics.instance_id, state=state, version=CELLBLOCK_VERSION)
    families[f"{PREFIX}_microvm_info", "gauge"] = [f"{labels} 1"]
    for name in metrics.group_names():
        if name not in SUMMED_KINDS:
            _add(families, f"{PREFIX}_{name}", "", metrics[name])
    for kind, device_id, group in metrics.devices():
        _add(families, f"{PREFIX}_{kind}", _labels(id=device_id), group)
    lines = []
    for (family, kind), samples in families.items():
        # Readers of this version of the format take the whole name of a counter, with _total, as the family's name.
        lines.append(f"# TYPE {family} {kind}\n")
        lines += [f"{family}{sample}\n" for sample in samples]
    return "".join(lines)


def _add(families: dict[tuple[str, str], list[str]], prefix: str, labels: str, group: Counters) -> None:
    def sample(name: str, kind: str, value: int) -> None:
        families.setdefault((f"{prefix}_{name}", kind), []).append(f"{labels} {value}")

    for key, value in group.values.items():
        if key in group.stored:
            sample(key, "gauge", value)
        else:
            sample(f"{key}_total", "counter", value)
    for key, aggregate in group.aggregates.items():
        sample(f"{key}_min_us", "gauge", aggregate.minimum)
        sample(f"{key}_max_us", "gauge", aggregate.maximum)
        sample(f"{key}_sum_us_total", "counter", aggregate.total)


def _labels(**labels: str) -> str:
    return "{" + ",".join([f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()]) + "}"
