"""Numbers made of a run, as vLLM's `bench serve` names them, and what repeats say about them.

TTFT, TPOT and E2E are per request, then summarised; ITL pools every gap of every request (tokens that came in one piece
have none between them). All over the requests that succeeded; throughput is their tokens over the time from the first
arrival to the last token. Milliseconds in what is printed and stored, seconds everywhere else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flover.bench.records import Record, Run

Numbers = dict[str, float]
GOALS = ("ttft", "tpot", "e2el")
REFUSALS = (429, 503)  # "rejected": these, counted as failed too
COUNTS = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "rejected": "Rejected requests:",
    "p99_rejection_ms": "P99 time to a rejection (ms):",
    "max_concurrency": "Maximum request concurrency:",
    "request_rate": "Request rate configured (RPS):",
    "mean_late_ms": "Mean client lateness (ms):",
    "p99_late_ms": "P99 client lateness (ms):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "max_concurrent_requests": "Peak concurrent requests:",
    "total_token_throughput": "Total Token throughput (tok/s):",
}
LATENCIES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """{"ttft": 0.5} (seconds) of ["ttft:500"] (milliseconds); one text may hold several.

    Raises:
        ValueError: an unknown name or a limit that is no positive number.
    """
    goals = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, text = part.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if name not in GOALS or not 0 < limit < math.inf:
            raise ValueError(f"goodput must be NAME:MILLISECONDS with a name of {', '.join(GOALS)}, got {part!r}")
        goals[name] = limit / 1e3
    return goals


def measure(run: Run, goals: Mapping[str, float] | None = None, percentiles: Sequence[float] = (99,)) -> Numbers:
    """The numbers of a run, keyed as in the JSON of vLLM's bench.

    Args:
        goals: seconds by name (`parse_goals`); with some, `request_goodput` counts the requests that meet all of them.
        percentiles: of each latency (nearest rank), beside mean and median.
    """
    good = [record for record in run.records if succeeded(record)]
    seconds = max(run.duration, 1e-9)
    inputs, outputs = sum(r.num_prompt for r in good), sum(len(r.times) for r in good)
    numbers: Numbers = {"completed": len(good), "failed": len(run.records) - len(good)}
    numbers |= _over_http(run.records)
    numbers |= {
        "duration": run.duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
    }
    if goals:
        numbers["request_goodput"] = sum(_meets(record, goals) for record in good) / seconds
    numbers["output_throughput"] = outputs / seconds
    numbers["total_token_throughput"] = (inputs + outputs) / seconds
    values = {
        "ttft": [r.ttft for r in good],
        "tpot": [r.tpot for r in good if len(r.times) > 1],
        "itl": [b - a for r in good for a, b in zip(r.times, r.times[1:]) if b > a],
        "e2el": [r.e2e for r in good],
    }
    for name, each in values.items():
        numbers[f"mean_{name}_ms"] = statistics.fmean(each) * 1e3 if each else 0.0
        numbers[f"median_{name}_ms"] = statistics.median(each) * 1e3 if each else 0.0
        for percent in percentiles:
            numbers[f"p{percent:g}_{name}_ms"] = percentile(each, percent) * 1e3
    return numbers


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 of nothing."""
    rank = max(math.ceil(percent * len(values) / 100), 1)
    return sorted(values)[rank - 1] if values else 0.0


def _over_http(records: Sequence[Record]) -> Numbers:
    """What only a client of a server can know; nothing of other runs."""
    sent = [record for record in records if record.sent is not None and record.ended is not None]
    if not sent:
        return {}
    refused = [(r.ended or 0.0) - (r.sent or 0.0) for r in sent if r.status in REFUSALS]
    late = [(r.sent or 0.0) - r.arrival for r in sent]
    edges = sorted([(r.sent, 1) for r in sent] + [(r.ended, -1) for r in sent])
    return {
        "rejected": len(refused),
        "p99_rejection_ms": percentile(refused, 99) * 1e3,
        "mean_late_ms": statistics.fmean(late) * 1e3,
        "p99_late_ms": percentile(late, 99) * 1e3,
        "max_concurrent_requests": max(accumulate(step for _, step in edges)),
    }


def succeeded(record: Record) -> bool:
    """Whether it has its tokens."""
    return record.error is None and bool(record.times)


def _meets(record: Record, goals: Mapping[str, float]) -> bool:
    """A request of one token has no gap and meets any TPOT, as in vLLM."""
    tpot = record.tpot if len(record.times) > 1 else 0.0
    found = {"ttft": record.ttft, "tpot": tpot, "e2el": record.e2e}
    return all(found[name] <= limit for name, limit in goals.items())


# ---- repeats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over repeats; `half`: half the width of its 95 % confidence interval, None of a single one."""

    mean: float
    half: float | None = None

    @property
    def margin(self) -> str:
        """ " ± half" to two digits, or nothing."""
        if not self.half:
            return ""
        return f" ± {self.half:.0f}" if self.half >= 10 else f" ± {self.half:.2g}"

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, t_quantile(0.975, len(values) - 1) * error)


def over_repeats(numbers: Sequence[Numbers]) -> dict[str, Estimate]:
    """Each number over the repeats."""
    return {name: Estimate.of([each[name] for each in numbers]) for name in numbers[0]}


def t_quantile(p: float, df: int) -> float:
    """The p-quantile (0.5 <= p < 1) of Student's t with `df` degrees of freedom.

    With t = sqrt(df) tan(x), P(|T| < t) is a finite sum in sin x and cos x (Abramowitz and Stegun, 26.7.3 and 26.7.4),
    which grows with x: bisection over x in [0, pi / 2].
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _two_sided(x: float, df: int) -> float:
    cosine = math.cos(x)
    term, total = (cosine if df % 2 else 1.0), 0.0
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (x + math.sin(x) * total) if df % 2 else math.sin(x) * total


# ---- what is printed -------------------------------------------------------------------------------------------------


def block(
    found: Mapping[str, Estimate], title: str = "Serving Benchmark Result", metrics: Sequence[str] = tuple(LATENCIES)
) -> str:
    """The result block of vLLM's bench serve; over repeats with the half width of the confidence interval."""
    lines = [f"{f' {title} ':=^50}"]
    lines += [_line(label, found[name]) for name, label in COUNTS.items() if name in found]
    for name in metrics:
        lines.append(f"{LATENCIES[name]:-^50}")
        for key, value in found.items():
            word, _, rest = key.partition("_")
            if rest == f"{name}_ms":
                label = word.upper() if word[1:2].isdigit() else word.capitalize()
                lines.append(_line(f"{label} {name.upper()} (ms):", value))
    return "\n".join([*lines, "=" * 50])


def _line(label: str, value: Estimate) -> str:
    exact = value.mean == round(value.mean) and not value.half and "/s" not in label and "(" not in label
    text = f"{value.mean:.0f}" if exact else f"{value.mean:.2f}"
    return f"{label:<40}{text:<10}{value.margin}".rstrip()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def run_json(run: Run, numbers: Numbers, seed: int) -> dict[str, Any]:
    """A run with every request; times in seconds from the start of the run."""
    requests = [
        {
            "arrival": round(record.arrival, 6),
            "num_prompt": record.num_prompt,
            "times": [round(time, 6) for time in record.times],
            "error": record.error,
        }
        for record in run.records
    ]
    return {"system": run.system, "seed": seed, **numbers, "requests": requests}


def estimates_json(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Mean and the ends of the 95 % confidence interval, by number."""
    return {
        name: {"mean": e.mean, "ci95": None if e.half is None else [e.mean - e.half, e.mean + e.half]}
        for name, e in found.items()
    }
