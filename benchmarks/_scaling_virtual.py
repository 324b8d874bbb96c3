"""The real scheduler on a virtual clock whose steps take what the cost model says: what the fluid model is held to."""

from __future__ import annotations

import numpy as np
from _scaling_fluid import Load, Result
from _scaling_rows import StepTable

from flover.config import KVConfig, SchedulerConfig
from flover.engine.batch import StepResult
from flover.engine.scheduler import Scheduler
from flover.engine.step import Step
from flover.kv.paged import PagedLayout
from flover.request import Request, RowSampling

BLOCK = 16


def serve(table: StepTable, load: Load, replica: np.ndarray, max_rows: int, budget: int, kv_tokens: int) -> Result:
    """Requests on the replicas that they were sent to; one scheduler each, depth 0."""
    count = len(load.arrival)
    result = Result(np.zeros(count), np.zeros(count), replica)
    for one in np.unique(replica).tolist():
        _replica(table, load, np.nonzero(replica == one)[0].tolist(), result, max_rows, budget, kv_tokens)
    return result


def _replica(
    table: StepTable, load: Load, ids: list[int], result: Result, max_rows: int, budget: int, kv_tokens: int
) -> None:
    now = 0.0
    blocks = kv_tokens // BLOCK
    config = SchedulerConfig(max_rows, budget, max_model_len=1 << 16)
    kv_config = KVConfig("paged", "off", BLOCK, blocks, "bfloat16", 1, prefix_caching=False)
    layout = PagedLayout(blocks, BLOCK, enable_prefix_caching=False)
    scheduler = Scheduler(config, kv_config, layout, lambda: now)
    waiting = list(reversed(ids))
    while waiting or scheduler.has_unfinished():
        while waiting and load.arrival[waiting[-1]] <= now:
            i = waiting.pop()
            length, output = int(load.prompt[i]), int(load.output[i])
            request = Request(str(i), [0] * length, RowSampling(seed=0, temperature=0.0), output)
            request.arrival_time = float(load.arrival[i])
            scheduler.add(request)
        step = scheduler.schedule()
        if step is None:
            now = max(now, float(load.arrival[waiting[-1]])) if waiting else now
            continue
        now += _seconds(step, table)
        sampled = len(step.sampled)
        output = scheduler.update(step, StepResult(np.ones(sampled, dtype=np.int64), np.ones(sampled, dtype=bool)))
        for request in output.finished:
            i = int(request.request_id)
            result.first[i], result.last[i] = request.first_token_time, request.finish_time


def _seconds(step: Step, table: StepTable) -> float:
    """Of a plan: rows that decode with their tokens, prompt tokens with the pairs of their attention."""
    scheduled = step.plan.scheduled()
    lengths = np.array([len(request.token_ids) for request in step.rows], dtype=float)
    prefill = np.array([not request.num_output_tokens for request in step.rows], dtype=bool)
    decode = ~prefill & (scheduled > 0)
    chunks = scheduled[prefill].astype(float)
    pairs = float((chunks * lengths[prefill] / 2).sum())
    return float(table(decode.sum() + len(step.first), lengths[decode].sum(), chunks.sum() - len(step.first), pairs))
