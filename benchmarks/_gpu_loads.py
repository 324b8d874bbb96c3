"""Loads of gpu.py: requests that arrive by a Poisson process, offline traces, saturation; how prefill modes compare."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from _gpu_engine import Bench, Engine

from flover.bench.records import Run
from flover.bench.workload import Lognormal, make_jobs
from flover.bench.workload import poisson as arrivals
from flover.config import CHOICES
from flover.metrics import Distribution

# vLLM 0.26.0, Llama-3-8B bf16 on an H200, measured apart: requests/s -> p99 TTFT, mean TPOT, ms
VLLM_POISSON = {4: (41, 4.94), 16: (56, 5.84), 32: (76, 6.46)}


def poisson_trace(rate: float, count: int, limit: int, seed: int = 0) -> tuple[list[tuple[int, int]], list[float]]:
    """Prompt and output lengths, together at most `limit`, and arrivals in seconds."""
    laws = Lognormal.of(200, 700), Lognormal.of(180, 500)
    jobs = make_jobs(arrivals(rate), *laws, count, 2, seed, limit, shrink=True)
    return [(len(job.prompt), job.num_output) for job in jobs], [job.arrival for job in jobs]


def warm(engine: Engine, bench: Bench) -> None:
    """What a load of changing batch sizes meets beside the captured shapes."""
    lengths, due = poisson_trace(32, bench.small(96, 2), bench.small(1900, 64), seed=1)
    engine.run([(n, min(m, 32)) for n, m in lengths], due)


def poisson(bench: Bench, rates: Sequence[int], most: int = 150, **settings: Any) -> list[dict[str, Any]]:
    """Latency under load: 25 s of arrivals per rate, `most` requests; no bound, vLLM's numbers beside ours."""
    engine = bench.engine(**settings)
    warm(engine, bench)
    rows = []
    for rate in rates:
        count = bench.small(min(most, 25 * rate), 4)
        lengths, due = poisson_trace(rate, count, min(bench.small(1900, 64), engine.max_model_len))
        run = engine.run(lengths, due)
        ttft = Distribution.of([record.ttft for record in run.records])
        tpot = [record.tpot for record in run.records if len(record.times) > 1]
        gaps = [b - a for record in run.records for a, b in pairwise(record.times)]
        row: dict[str, Any] = {
            "requests_per_s": rate,
            "requests": count,
            "mean_prompt": round(statistics.fmean(n for n, _ in lengths)),
            "mean_output": round(statistics.fmean(m for _, m in lengths)),
            "p50_ttft_ms": round(ttft.median * 1e3, 1),
            "p99_ttft_ms": round(ttft.p99 * 1e3, 1),
            "mean_tpot_ms": round(statistics.fmean(tpot) * 1e3, 3),
            "p99_itl_ms": round(Distribution.of(gaps).p99 * 1e3, 2),
            "seconds": round(run.duration, 2),
        }
        if bench.name == "llama3-8b" and rate in VLLM_POISSON:
            row["vllm_p99_ttft_ms"], row["vllm_mean_tpot_ms"] = VLLM_POISSON[rate]
        print("poisson", settings or "", row, flush=True)
        rows.append(row)
    return rows


def time_by_step(run: Run) -> list[dict[str, Any]]:
    """Where a load's time went: steps with prefill, and decode steps by rows, from one step's end to the next's."""
    kinds: dict[str, dict[str, Any]] = {}
    last = 0.0
    for stats in run.steps:
        rows = stats.num_decode_tokens
        most = next((b for b in (64, 128, 256, 384, 512) if rows <= b), rows)
        name = "with prefill" if stats.num_prefill_tokens else f"decode, up to {most} rows"
        kind = kinds.setdefault(name, {"steps": 0, "seconds": 0.0, "prefill_tokens": 0, "decode_tokens": 0})
        kind["steps"] += 1
        kind["seconds"] += stats.end - last
        kind["prefill_tokens"] += stats.num_prefill_tokens
        kind["decode_tokens"] += rows
        last = stats.end
    return [{"kind": name, **kind, "seconds": round(kind["seconds"], 3)} for name, kind in kinds.items()]


def throughput(engine: Engine, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All requests at once: output tokens/s beside the bound of the whole trace."""
    run = engine.run(lengths)
    seconds, outputs, bound = run.duration, sum(m for _, m in lengths), engine.bound.trace(lengths)
    assert sum(len(record.token_ids) for record in run.records) == outputs
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(n for n, _ in lengths),
        "output_tokens": outputs,
        "seconds": round(seconds, 2),
        "bound_s": round(bound, 3),
        "share_of_bound": round(bound / seconds, 3),
        "share_of_sustained_bound": round(engine.bound.sustained().trace(lengths) / seconds, 3),
        "output_tokens_per_s": round(outputs / seconds),
        "preemptions": sum(record.num_preemptions for record in run.records),
        "time_by_step": time_by_step(run),
    }


def offline(bench: Bench, count: int = 512, **settings: Any) -> dict[str, Any]:
    """`count` requests at once, a row for each, prompts uniform 32-1024, outputs uniform 32-512."""
    engine, rng = bench.engine(max_num_seqs=count, **settings), random.Random(0)
    small = bench.small
    lengths = [
        (rng.randint(small(32), small(1024)), rng.randint(small(32), small(512))) for _ in range(small(count, 4))
    ]
    engine.run([(n, min(m, 8)) for n, m in lengths[:64]])
    result = throughput(engine, lengths)
    print("offline", settings or "", result, flush=True)
    return result


def saturated(bench: Bench, count: int) -> dict[str, Any]:
    """`count` requests of 1000 tokens in and 1000 out at once, all in one batch if the cache holds them."""
    engine = bench.engine(max_num_seqs=count)
    length = min(1000, engine.max_model_len // 2)
    lengths = [(bench.small(length), bench.small(length, 4))] * count
    engine.run([(n, 4) for n, _ in lengths])
    result = throughput(engine, lengths)
    kv = engine.core.resolved.kv
    result |= {"kv_tokens": kv.num_blocks * kv.block_size, "weight_bytes": engine.bound.weight_bytes}
    print("saturated", result, flush=True)
    return result


def modes(bench: Bench) -> dict[str, dict[str, Any]]:
    """Every prefill mode on a Poisson load of 32 requests/s."""
    return {mode: poisson(bench, [32], prefill_mode=mode)[0] for mode in CHOICES["prefill_mode"]}
