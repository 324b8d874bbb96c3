"""Metrics: counted on the event loop in plain numbers, and turned into prometheus-client's families when scraped.

A scrape is one look at one moment, so that accepted = finished + aborted + failed + live always holds, per prompt.
Names follow vLLM's, with the prefix `flover:`, or vLLM's own under --metrics-compat vllm.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flover.engine.llm_engine import Prepared
from flover.metrics import StepStats
from flover.request import RequestOutput
from flover.server.histogram import GAPS, LATENCY, TOKENS, Histogram
from flover.server.load import Live, Load
from flover.server.records import EndRecord, Listener

Kind = type[GaugeMetricFamily | CounterMetricFamily]
PREFIXES = {"flover": "flover:", "vllm": "vllm:"}  # --metrics-compat


class Latencies(NamedTuple):
    """What a step brought: new tokens, seconds to those that are a prompt's first, and since the one before."""

    tokens: int
    ttft: Sequence[float]
    itl: Sequence[float]


class Metrics(Collector):
    """An `AsyncLLM`'s observer. `load` is kept up to date by it.

    Args:
        compat: whose names, a key of `PREFIXES`.
    """

    def __init__(self, load: Load, model: str, compat: str = "flover") -> None:
        self.load = load
        self._model, self._prefix = model, PREFIXES[compat]
        self.accepted = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0})  # by reason, as the three below
        self.aborted_for: Counter[str] = Counter({"disconnect": 0, "deadline": 0, "admin": 0, "shutdown": 0})
        self.failed_for: Counter[str] = Counter({"generation": 0, "engine_dead": 0})
        self.rejected: Counter[str] = Counter({"queue_full": 0, "draining": 0, "engine_dead": 0})
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = self.preemptions = self.restarts = 0
        self.blocks = (0, 0, 0)  # of the KV cache: free, cached, used
        self.listeners: list[Listener] = []
        self._ttft = Histogram("time_to_first_token_seconds", "Arrival to first token.", LATENCY)
        self._itl = Histogram("inter_token_latency_seconds", "Between tokens of a prompt.", GAPS)
        self._tpot = Histogram(
            "request_time_per_output_token_seconds", "Mean gap of a prompt, of those that finished.", GAPS
        )
        self._e2e = Histogram("e2e_request_latency_seconds", "Arrival to last token, of those that finished.", LATENCY)
        self._queue = Histogram("request_queue_time_seconds", "Arrival to scheduled.", LATENCY)
        self._prefill = Histogram("request_prefill_time_seconds", "Scheduled to first token.", LATENCY)
        self._decode = Histogram("request_decode_time_seconds", "First to last token.", LATENCY)
        self._inference = Histogram("request_inference_time_seconds", "Scheduled to last token.", LATENCY)
        self._prompt_lens = Histogram("request_prompt_tokens", "Prompt tokens of a prompt that finished.", TOKENS)
        self._output_lens = Histogram("request_generation_tokens", "Its output tokens.", TOKENS)
        self._step_tokens = Histogram("iteration_tokens_total", "Tokens of a step.", TOKENS)
        self._step = Histogram("step_seconds", "A step of the engine, from plan to result.", GAPS)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # ---- as an observer ----------------------------------------------------------------------------------------------

    def added(self, prepared: Prepared) -> None:
        self.accepted += 1
        self.load.add(prepared.request_id, len(prepared.choices), len(prepared.prompt_token_ids))

    def stepped(self, outputs: Sequence[RequestOutput], stats: StepStats | None) -> Latencies:
        if stats is not None:
            self.load.stats = stats
            if stats.end:
                self._step.observe(stats.end - stats.start)
                self._step_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        now, tokens_before = time.monotonic(), self.generation_tokens
        ttft: list[float] = []
        itl: list[float] = []
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
                    itl.append(now - one.last)
                else:
                    ttft.append(now - one.arrival)
                    self.prompt_tokens += one.prompt_tokens
                    self.load.started(one)
                one.num_tokens, one.last = num_tokens, now
            if output.finished:
                self._end(output, now)
        self._ttft.observe(*ttft)
        self._itl.observe(*itl)
        return Latencies(self.generation_tokens - tokens_before, ttft, itl)

    def died(self, error: Exception) -> None:
        now = time.monotonic()
        self.blocks = (0, 0, 0)
        for request_id in list(self.load.live):
            one = self.load.remove(request_id)
            self.failed_for["engine_dead"] += 1
            self._tell(one, now, None, request_id, "failed", "engine_dead")

    def _end(self, output: RequestOutput, now: float) -> None:
        one = self.load.remove(output.request_id)
        reasons = {choice.finish_reason for choice in output.outputs}
        outcome, reason = "finished", "stop" if "stop" in reasons else "length"
        if "error" in reasons:
            outcome, reason = "failed", "generation"
            self.failed_for[reason] += 1
        elif "abort" in reasons:
            outcome, reason = "aborted", one.why
            self.aborted_for[reason] += 1
        else:
            self.finished[reason] += 1
            self._observe_finished(output, now - one.arrival)
        if output.metrics is not None:
            self.preemptions += output.metrics.num_preemptions
        self.cached_tokens += output.num_cached_tokens
        self._tell(one, now, output, output.request_id, outcome, reason)

    def _observe_finished(self, output: RequestOutput, e2e: float) -> None:
        self._e2e.observe(e2e)
        self._prompt_lens.observe(len(output.prompt_token_ids))
        self._output_lens.observe(sum(len(choice.token_ids) for choice in output.outputs))
        times = output.metrics
        if times is not None:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
            self._prefill.observe(times.first_token_time - times.first_scheduled_time)
            self._decode.observe(times.last_token_time - times.first_token_time)
            self._inference.observe(times.last_token_time - times.first_scheduled_time)
            if times.num_output_tokens > 1:
                self._tpot.observe(times.tpot)

    def _tell(
        self, one: Live, now: float, output: RequestOutput | None, request_id: str, outcome: str, reason: str
    ) -> None:
        """An end to the listeners; `output` is what there is of it."""
        if not self.listeners:
            return
        times = output.metrics if output else None
        record = EndRecord(
            request_id=request_id,
            label=one.label,
            outcome=outcome,
            reason=reason,
            arrival=time.time() - (now - one.arrival),
            prompt_tokens=one.prompt_tokens,
            cached_tokens=output.num_cached_tokens if output else 0,
            output_tokens=one.num_tokens,
            choices=one.choices,
            preemptions=times.num_preemptions if times else 0,
            queue=times.first_scheduled_time - times.arrival_time if times and times.first_scheduled_time else None,
            ttft=times.ttft if times and times.first_token_time else None,
            e2e=now - one.arrival,
            error=next((c.error for c in output.outputs if c.error), None) if output else None,
            prompt=output.prompt if output else None,
        )
        for listener in self.listeners:
            listener(record)

    # ---- as a collector ----------------------------------------------------------------------------------------------

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that live requests hold."""
        return self.blocks[2] / max(sum(self.blocks), 1)

    def text(self) -> bytes:
        """The exposition; call it on the event loop."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        for family in self._families():
            for i, sample in enumerate(family.samples):
                family.samples[i] = sample._replace(labels={"model_name": self._model, **sample.labels})
            yield family

    def _families(self) -> Iterator[Metric]:
        gauge, counter = partial(self._family, GaugeMetricFamily), partial(self._family, CounterMetricFamily)
        load, free_cached_used = self.load, dict(zip(("free", "cached", "used"), self.blocks))
        yield gauge("num_requests_live", "Prompts that have not ended.", len(load.live))
        yield gauge("num_requests_running", "Rows in the running batch.", load.running)
        yield gauge("num_requests_waiting", "Rows that wait for a place in it.", load.waiting)
        yield gauge("queue_tokens", "Prompt tokens of prompts that have no token yet.", load.queued_tokens)
        yield gauge("kv_cache_usage_perc", "KV cache usage; 1 means 100 percent.", self.kv_usage)
        yield gauge("kv_blocks", "Blocks of the KV cache after the last step.", free_cached_used, "state")
        yield counter("request_accepted", "Prompts that were queued.", self.accepted)
        yield counter("request_success", "Prompts that finished.", self.finished, "finished_reason")
        yield counter("request_rejected", "Requests refused for load.", self.rejected, "reason")
        yield counter("request_aborted", "Prompts that were withdrawn.", self.aborted_for, "reason")
        yield counter("request_failed", "Prompts that ended with an error.", self.failed_for, "reason")
        yield counter("prompt_tokens", "Prompt tokens computed or cached.", self.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", self.generation_tokens)
        yield counter("prefix_cache_queries", "Prompt tokens looked up.", self.prompt_tokens)
        yield counter("prefix_cache_hits", "Of them, found; when a prompt ends.", self.cached_tokens)
        yield counter("num_preemptions", "Rows preempted.", self.preemptions)
        yield counter("engine_restarts", "Engines started after one died.", self.restarts)
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self._prefix)

    def _family(self, kind: Kind, name: str, help: str, value: float | Mapping[str, int], label: str = "") -> Metric:
        """`value` is one number, or one for each value of the label."""
        if not isinstance(value, Mapping):
            return kind(self._prefix + name, help, value=value)
        family = kind(self._prefix + name, help, labels=[label])
        for each, count in value.items():
            family.add_metric([each], count)
        return family
