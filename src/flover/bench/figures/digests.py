"""What the figures keep of a run: times, steps, rows, bytes, whether the tokens are those of serial, curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flover.bench.records import Job, Run

Data = dict[str, Any]
Tokens = Sequence[Sequence[int]]
Extra = Callable[[Run], Data]
POINTS = 200  # of a curve
STILL = 20, 0.1  # a step that takes so many medians and so many seconds is none of the system's own


def partings(tokens: Tokens, reference: Tokens) -> list[int | None]:
    """By request the first output position where it is another than serial's, None if there is none.

    A reference that is shorter is a prefix (greedy): only as many tokens, and as many requests, are compared.
    """
    found = []
    for ours, theirs in zip(tokens, reference, strict=False):
        pairs = zip(ours, theirs)
        found.append(next((i for i, (a, b) in enumerate(pairs) if a != b), None))
    return found


def agree(tokens: Tokens, reference: Tokens) -> Data:
    """Requests compared, those whose tokens are serial's, and the first output position where another parts."""
    found = partings(tokens, reference)
    parted = [p for p in found if p is not None]
    return {
        "requests": len(found),
        "identical": len(found) - len(parted),
        "first_parting": min(parted, default=None),
        "logit_gap": None,
    }


def total(parts: Sequence[Data]) -> Data:
    """Of several runs' `agree`; of the logit gaps the largest."""
    sums: Data = {key: sum(part[key] for part in parts) for key in ("requests", "identical")}
    for key, choose in (("first_parting", min), ("logit_gap", max)):
        known = [part[key] for part in parts if part[key] is not None]
        sums[key] = choose(known, default=None)
    return sums


def digest(run: Run, jobs: Sequence[Job], reference: Tokens) -> Data:
    """What every figure keeps of a run. Seconds; rows are per step that computed something."""
    steps = [s for s in run.steps if s.num_prefill_tokens or s.num_decode_tokens]
    data: Data = {
        "requests": len(jobs),
        "seconds": run.duration,
        "tokens": sum(len(record.token_ids) for record in run.records),
        "latency": statistics.fmean(record.e2e for record in run.records),
        "agree": agree([record.token_ids for record in run.records], reference),
    }
    if steps:
        data |= {
            "steps": len(steps),
            "rows_live": statistics.fmean(s.num_running for s in steps),
            "rows_computed": statistics.fmean(s.num_running + s.num_dead_rows for s in steps),
            "kv_moved_bytes": sum(s.kv_moved_bytes for s in run.steps),
            "kv_token_bytes_read": float(sum(s.kv_used_bytes for s in steps)),
            "step_times": step_times(run),
            "step_spans": step_spans(run),
            "busy": busy_seconds(run),
            "reorder_host": run.reorder_host,
            "reorder_device": run.reorder_device,
        }
    return data


def busy_seconds(run: Run) -> float:
    """Time that steps take, without the waiting between them."""
    ends = [0.0, *(step.end for step in run.steps)]
    return sum(step.end - max(step.start, end) for step, end in zip(run.steps, ends))


def step_times(run: Run) -> list[list[float]]:
    """[rows, steps of decode alone with so many rows, their median seconds]; between steps that follow each other.

    A step that waited for an arrival begins when it was planned; its time does not count.
    """
    found: dict[int, list[float]] = {}
    for before, step in zip(run.steps, run.steps[1:]):
        if step.num_decode_tokens and not step.num_prefill_tokens and step.start < before.end:
            found.setdefault(step.num_running + step.num_dead_rows, []).append(step.end - before.end)
    return [[rows, len(times), statistics.median(times)] for rows, times in sorted(found.items())]


def step_spans(run: Run) -> list[float]:
    """Median and longest seconds from a step's plan to its result; a busy engine always has one under way."""
    spans = [step.end - step.start for step in run.steps]
    return [statistics.median(spans), max(spans)]


def standstill(data: Data) -> tuple[float, float] | None:
    """Longest and median seconds of a run's steps if it stood still, as on a machine that others disturb.

    None: it did not, or there are no steps, or it is of the time before this was kept.
    """
    median, longest = data.get("step_spans", (0.0, 0.0))
    return (longest, median) if longest > max(STILL[0] * median, STILL[1]) else None


def seconds_by_rows(runs: Sequence[Data]) -> Callable[[int], float] | None:
    """Seconds of a decode step of so many rows, fitted (a + b rows, by steps) to the `step_times` of runs."""
    points = np.array([point for run in runs for point in run.get("step_times", ())], dtype=np.float64)
    if not len(points):
        return None
    weights = np.sqrt(points[:, 1])
    columns = np.stack([weights, weights * points[:, 0]], axis=1)
    (base, each), *_ = np.linalg.lstsq(columns, weights * points[:, 2], rcond=None)
    return lambda rows: float(base + each * rows)


def curves_of(run: Run) -> Data:
    """At most `POINTS` (seconds, cumulative) pairs of tokens and the last, and all of finished requests."""
    times = sorted(t for record in run.records for t in record.times)
    ends = sorted(record.times[-1] for record in run.records)
    every = -(-len(times) // POINTS)
    kept = [*range(0, len(times), every), len(times) - 1]
    return {
        "curve_tokens": [[round(times[i], 5), i + 1] for i in kept],
        "curve_finished": [[0.0, 0], *([round(t, 5), i + 1] for i, t in enumerate(ends))],
    }
