"""Counts in buckets, in plain numbers, and as prometheus-client's family."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily

LATENCY = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Values in buckets; seconds unless the bounds say otherwise."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name, self._help = name, help
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, *values: float) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def family(self, prefix: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(prefix + self._name, self._help)
        total, buckets = 0, []
        for bound, count in zip([*(str(float(b)) for b in self._bounds), "+Inf"], self._counts):
            total += count
            buckets.append((bound, total))
        family.add_metric([], buckets, self._sum)
        return family
