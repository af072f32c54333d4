"""What a part counts, wherever it lives; vmm.observe.metrics writes it (docs/formats/metrics.md)."""

from __future__ import annotations

from base.lean_typing import Any


class Aggregate:
    """Least and greatest latency ever, and the sum of all, in µs."""

    __slots__ = ("count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.minimum = self.maximum = self.total = self.count = 0

    def observe(self, microseconds: int) -> None:
        """Take one latency in."""
        self.minimum = min(self.minimum, microseconds) if self.count else microseconds
        self.maximum = max(self.maximum, microseconds)
        self.total += microseconds
        self.count += 1

    def merge(self, other: Aggregate) -> None:
        """Take everything in that another one has seen."""
        if other.count:
            self.minimum = min(self.minimum, other.minimum) if self.count else other.minimum
            self.maximum = max(self.maximum, other.maximum)
            self.total += other.total
            self.count += other.count


class Counters:
    """Named numbers that only grow, numbers that are set, and aggregates of latencies.

    ``keys`` are separated by spaces: ``=`` marks a value that is set, ``~`` an aggregate, ``*`` expands to _count and
    _fails. An unknown key is a KeyError: clients refuse lines with keys that they do not know.
    """

    __slots__ = ("aggregates", "flushed", "stored", "values")

    def __init__(self, keys: str) -> None:
        self.values: dict[str, int] = {}
        self.aggregates: dict[str, Aggregate] = {}
        stored = []
        for key in keys.split():
            mark, name = key[0], key[1:]
            if mark == "~":
                self.aggregates[name] = Aggregate()
            elif mark == "*":
                self.values[f"{name}_count"] = self.values[f"{name}_fails"] = 0
            elif mark == "=":
                self.values[name] = 0
                stored.append(name)
            else:
                self.values[key] = 0
        self.stored = frozenset(stored)
        #: What the last line that was written had counted.
        self.flushed: dict[str, int] = {}

    def add(self, key: str, amount: int = 1) -> None:
        """Count."""
        self.values[key] += amount

    def store(self, key: str, value: int) -> None:
        """Set a stored value, or a counter to what another part has counted in all."""
        if key not in self.values:
            raise KeyError(key)
        self.values[key] = value

    def observe(self, key: str, microseconds: int) -> None:
        """Take a latency into an aggregate."""
        self.aggregates[key].observe(microseconds)

    def merge(self, other: Counters) -> None:
        """Add what another group of the same keys has."""
        for key, value in other.values.items():
            self.values[key] += value
        for key, aggregate in other.aggregates.items():
            self.aggregates[key].merge(aggregate)

    def copy(self) -> Counters:
        """Return another group that has counted the same."""
        copied = Counters("")
        copied.values = dict.fromkeys(self.values, 0)
        copied.aggregates = {key: Aggregate() for key in self.aggregates}
        copied.merge(self)
        return copied

    def clear(self) -> None:
        """Set everything to 0, but for what was written."""
        self.values = dict.fromkeys(self.values, 0)
        self.aggregates = {key: Aggregate() for key in self.aggregates}

    def shown(self) -> dict[str, Any]:
        """Return what a line shows: a number a key, or an object with three for an aggregate."""
        flushed = self.flushed
        shown: dict[str, Any] = {
            key: value if key in self.stored else value - flushed.get(key, 0) for key, value in self.values.items()
        }
        for key, aggregate in self.aggregates.items():
            shown[key] = {
                "min_us": aggregate.minimum,
                "max_us": aggregate.maximum,
                "sum_us": aggregate.total - flushed.get(key, 0),
            }
        return shown

    def commit(self) -> None:
        """The line was written: the next one begins from here."""
        self.flushed = {**self.values, **{key: aggregate.total for key, aggregate in self.aggregates.items()}}
