"""What a loop counts for each batch of requests; brought into the device's counters when somebody looks."""

from __future__ import annotations

from base.counters import Aggregate

#: What a loop that counts by itself hands over: count, bytes, sum of latencies, longest, shortest (ns).
Sums = tuple[int, int, int, int, int]


class Tally:
    """Requests of one kind: how many, their bytes, their latencies."""

    __slots__ = ("bytes", "count", "least_ns", "most_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.bytes = self.total_ns = self.most_ns = 0
        self.least_ns = 1 << 63

    def add(self, count: int, size: int, elapsed_ns: int) -> None:
        """Take requests in of ``size`` bytes together, that took ``elapsed_ns`` together."""
        self.count += count
        self.bytes += size
        self.total_ns += elapsed_ns
        mean = elapsed_ns // count
        if mean > self.most_ns:  # noqa: PLR1730  (max() and min() cost a tenth of a request alone)
            self.most_ns = mean
        if mean < self.least_ns:  # noqa: PLR1730
            self.least_ns = mean

    def merge(self, sums: Sums) -> None:
        """Take in what was counted elsewhere."""
        count, size, total_ns, most_ns, least_ns = sums
        self.count += count
        self.bytes += size
        self.total_ns += total_ns
        self.most_ns = max(self.most_ns, most_ns)
        self.least_ns = min(self.least_ns, least_ns)

    def take(self) -> tuple[int, int, Aggregate]:
        """Return count, bytes and latencies since the last time. The sum's part of a µs waits for the next time."""
        latencies = Aggregate()
        count, size = self.count, self.bytes
        if count:
            latencies.count = count
            latencies.minimum, latencies.maximum = self.least_ns // 1000, self.most_ns // 1000
            latencies.total, self.total_ns = divmod(self.total_ns, 1000)
            self.count = self.bytes = self.most_ns = 0
            self.least_ns = 1 << 63
        return count, size, latencies
