"""Metrics: counted on the event loop in plain numbers, and turned into prometheus-client's families when scraped.

A scrape is one look at one moment, so that accepted = finished + aborted + failed + live always holds, per prompt.
Names follow vLLM's, with the prefix `flover:`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from flover.engine.llm_engine import Prepared
from flover.metrics import StepStats
from flover.request import RequestOutput
from flover.server.load import Load

LATENCY = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Seconds in buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, help)
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts):
            total += count
            buckets.append((bound, total))
        family.add_metric([], buckets, self._sum)
        return family


class Metrics(Collector):
    """An `AsyncLLM`'s observer. `load` is kept up to date by it.

    Args:
        kv_bytes: size of the KV cache.
    """

    def __init__(self, load: Load, kv_bytes: int, model: str) -> None:
        self.load = load
        self._kv_bytes, self._model = kv_bytes, model
        self.accepted = self.aborted = self.failed = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0})  # by reason
        self.rejected: Counter[str] = Counter({"queue_full": 0, "draining": 0})
        self.prompt_tokens = self.generation_tokens = self.preemptions = self.restarts = 0
        self._stats: StepStats | None = None
        self._ttft, self._e2e = Histogram(LATENCY), Histogram(LATENCY)
        self._itl, self._step = Histogram(GAPS), Histogram(GAPS)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # ---- as an observer ----------------------------------------------------------------------------------------------

    def added(self, prepared: Prepared) -> None:
        self.accepted += 1
        self.load.add(prepared.request_id, len(prepared.choices), len(prepared.prompt_token_ids))

    def stepped(self, outputs: Sequence[RequestOutput], stats: StepStats | None) -> None:
        if stats is not None and stats is not self._stats:
            self._stats = stats
            self.load.stepped(stats)
            if stats.end:
                self._step.observe(stats.end - stats.start)
        now = time.monotonic()
        for output in outputs:
            one = self.load.live.get(output.request_id)
            if one is None:
                continue
            num_tokens = num_open = 0
            for choice in output.outputs:
                num_tokens += len(choice.token_ids)
                num_open += choice.finish_reason is None
            if num_open < one.rows:
                self.load.shrink(one, num_open)
            new = num_tokens - one.num_tokens
            if new:
                self.generation_tokens += new
                if one.num_tokens:
                    self._itl.observe(now - one.last)
                else:
                    self._ttft.observe(now - one.arrival)
                    self.prompt_tokens += one.prompt_tokens
                    self.load.started(one)
                one.num_tokens, one.last = num_tokens, now
            if output.finished:
                self._end(output, now)

    def died(self, error: Exception) -> None:
        for request_id in list(self.load.live):
            self.load.remove(request_id)
            self.failed += 1

    def restarted(self, kv_bytes: int) -> None:
        """Another engine, with a KV cache of that size."""
        self.restarts += 1
        self._kv_bytes = kv_bytes

    def _end(self, output: RequestOutput, now: float) -> None:
        one = self.load.remove(output.request_id)
        reasons = {choice.finish_reason for choice in output.outputs}
        if "error" in reasons:
            self.failed += 1
        elif "abort" in reasons:
            self.aborted += 1
        else:
            self.finished["stop" if "stop" in reasons else "length"] += 1
            self._e2e.observe(now - one.arrival)
        if output.metrics is not None:
            self.preemptions += output.metrics.num_preemptions

    # ---- as a collector ----------------------------------------------------------------------------------------------

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that live requests hold."""
        stats = self.load.stats
        return stats.kv_reserved_bytes / self._kv_bytes if stats is not None else 0.0

    def text(self) -> bytes:
        """The exposition; call it on the event loop."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        for family in self._families():
            for i, sample in enumerate(family.samples):
                family.samples[i] = sample._replace(labels={"model_name": self._model, **sample.labels})
            yield family

    def _families(self) -> Iterator[Metric]:
        load = self.load
        yield _gauge("num_requests_live", "Prompts that have not ended.", len(load.live))
        yield _gauge("num_requests_running", "Rows in the running batch.", load.running)
        yield _gauge("num_requests_waiting", "Rows that wait for a place in it.", load.waiting)
        yield _gauge("queue_tokens", "Prompt tokens of prompts that have no token yet.", load.queued_tokens)
        yield _gauge("kv_cache_usage_perc", "KV cache usage; 1 means 100 percent.", self.kv_usage)
        yield _counter("request_accepted", "Prompts that were queued.", self.accepted)
        yield _counter("request_success", "Prompts that finished.", self.finished, "finished_reason")
        yield _counter("request_rejected", "Requests refused for load.", self.rejected, "reason")
        yield _counter("request_aborted", "Prompts that were withdrawn.", self.aborted)
        yield _counter("request_failed", "Prompts that ended with an error.", self.failed)
        yield _counter("prompt_tokens", "Prompt tokens computed or cached.", self.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", self.generation_tokens)
        yield _counter("num_preemptions", "Rows preempted.", self.preemptions)
        yield _counter("engine_restarts", "Engines started after one died.", self.restarts)
        yield self._ttft.family("flover:time_to_first_token_seconds", "Arrival to first token.")
        yield self._itl.family("flover:inter_token_latency_seconds", "Between tokens of a prompt.")
        yield self._e2e.family("flover:e2e_request_latency_seconds", "Arrival to last token, of those that finished.")
        yield self._step.family("flover:step_seconds", "A step of the engine.")


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"flover:{name}", help, value=value)


def _counter(name: str, help: str, value: float | Mapping[str, int], label: str = "") -> Metric:
    """`value` is one number, or one for each value of the label."""
    if not isinstance(value, Mapping):
        return CounterMetricFamily(f"flover:{name}", help, value=value)
    family = CounterMetricFamily(f"flover:{name}", help, labels=[label])
    for name, count in value.items():
        family.add_metric([name], count)
    return family
