"""Loads of gpu.py: requests that arrive by a Poisson process, offline traces, saturation; how prefill modes compare."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

from _gpu_engine import Bench, Engine

from flover.bench.workload import Lognormal
from flover.config import CHOICES
from flover.metrics import Distribution

# vLLM 0.26.0, Llama-3-8B bf16 on an H200, measured apart: requests/s -> p99 TTFT, mean TPOT, ms
VLLM_POISSON = {4: (41, 4.94), 16: (56, 5.84), 32: (76, 6.46)}


def poisson_trace(rate: float, count: int, limit: int, seed: int = 0) -> tuple[list[tuple[int, int]], list[float]]:
    """Prompt and output lengths (each in [4, limit], together at most `limit`), and arrivals in seconds."""
    rng = random.Random(seed)
    prompt, output = Lognormal.of(200, 700), Lognormal.of(180, 500)
    lengths, arrivals, now = [], [], 0.0
    for _ in range(count):
        n = min(max(4, round(rng.lognormvariate(prompt.mu, prompt.sigma))), limit - 4)
        m = min(max(4, round(rng.lognormvariate(output.mu, output.sigma))), limit - n)
        lengths.append((n, m))
        arrivals.append(now)
        now += rng.expovariate(rate)
    return lengths, arrivals


def warm(engine: Engine, bench: Bench) -> None:
    """What a load of changing batch sizes meets beside the captured shapes."""
    lengths, arrivals = poisson_trace(32, bench.small(96, 2), bench.small(1900, 64), seed=1)
    engine.run([(n, min(m, 32)) for n, m in lengths], arrivals)


def poisson(bench: Bench, rates: Sequence[int], most: int = 150, **settings: Any) -> list[dict[str, Any]]:
    """Latency under load: 25 s of arrivals per rate, `most` requests; no bound, vLLM's numbers beside ours."""
    engine = bench.engine(**settings)
    warm(engine, bench)
    rows = []
    for rate in rates:
        count = bench.small(min(most, 25 * rate), 4)
        lengths, arrivals = poisson_trace(rate, count, min(bench.small(1900, 64), engine.max_model_len))
        gaps: list[float] = []
        seconds, done = engine.run(lengths, arrivals, gaps)
        ttft = Distribution.of([r.first_token_time - r.arrival_time for r in done])
        tpot = [(r.last_token_time - r.first_token_time) / (r.num_output_tokens - 1) for r in done]
        row: dict[str, Any] = {
            "requests_per_s": rate,
            "requests": count,
            "mean_prompt": round(statistics.fmean(n for n, _ in lengths)),
            "mean_output": round(statistics.fmean(m for _, m in lengths)),
            "p50_ttft_ms": round(ttft.median * 1e3, 1),
            "p99_ttft_ms": round(ttft.p99 * 1e3, 1),
            "mean_tpot_ms": round(statistics.fmean(tpot) * 1e3, 3),
            "p99_itl_ms": round(Distribution.of(gaps).p99 * 1e3, 2),
            "seconds": round(seconds, 2),
        }
        if bench.name == "llama3-8b" and rate in VLLM_POISSON:
            row["vllm_p99_ttft_ms"], row["vllm_mean_tpot_ms"] = VLLM_POISSON[rate]
        print("poisson", settings or "", row, flush=True)
        rows.append(row)
    return rows


def throughput(engine: Engine, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All requests at once: output tokens/s beside the bound of the whole trace."""
    seconds, requests = engine.run(lengths)
    outputs, bound = sum(m for _, m in lengths), engine.bound.trace(lengths)
    assert sum(r.num_output_tokens for r in requests) == outputs
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(n for n, _ in lengths),
        "output_tokens": outputs,
        "seconds": round(seconds, 2),
        "bound_s": round(bound, 3),
        "share_of_bound": round(bound / seconds, 3),
        "output_tokens_per_s": round(outputs / seconds),
        "preemptions": sum(r.num_preemptions for r in requests),
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
