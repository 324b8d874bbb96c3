"""Speed on one GPU: decode, prefill, throughput, latency under load, the paper's workload, where a step's time goes.

    python benchmarks/gpu.py --model llama3-8b    # everything, some minutes; writes benchmarks/results/gpu_*.json
    python benchmarks/gpu.py --model gptj-6b --only decode,anatomy
    python benchmarks/gpu.py --model tiny --device cpu --scale 64 --output tiny.json    # do all parts run?

Random weights at true shapes, bf16, greedy, token-id prompts, EOS ignored, prefix caching off. Each decode figure is
(time of 256 new tokens - time of 16) / 240 for B prompts of 128 tokens, and stands beside its bound:
max(weight bytes / BW, 2 P B / F) + live KV bytes / BW, with BW (a sum over 8 GiB) and F (an 8192^3 product, in the type
that the model's products compute in) measured in the same run. Weight bytes are those of the tensors that the model
holds; the token embedding, of which a step reads only a few rows, is left out (`flover.bound`).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from _gpu_engine import MODELS, Bench
from _gpu_loads import modes, offline, poisson, saturated

from flover.bench.keep import provenance
from flover.bound import heated, measured_limits
from flover.config import EngineConfig
from flover.profile import decoding, profile_decode, timed_steps

RESULTS = Path(__file__).parent / "results"
PRODUCTS = {"int8_w8a8": torch.int8, "fp8_w8a8": torch.float8_e4m3fn}  # what products compute in, if not in bf16
BATCH = [(random.Random(i).randint(16, 512), 128) for i in range(128)]  # what `generate_batch` is compared on


def decode(bench: Bench, batches: Sequence[int], **settings: Any) -> list[dict[str, Any]]:
    """Decode steps by batch, of prompts of 128 tokens, 256 and 16 tokens out."""
    engine, rows = bench.engine(**settings), []
    prompt, few, many = bench.small(128), bench.small(16, 2), bench.small(256, 8)
    for batch in batches:
        engine.run([(prompt, few)] * batch)  # capture
        short = min(engine.run([(prompt, few)] * batch).duration for _ in range(3))
        long = min(engine.run([(prompt, many)] * batch).duration for _ in range(2))
        rows.append(
            step_row(batch, (long - short) / (many - few), engine.bound.decode(batch, prompt + (few + many) / 2))
        )
        print("decode", settings or "", rows[-1], flush=True)
    return rows


def step_row(batch: int, step: float, limit: float) -> dict[str, Any]:
    """A decode step (seconds) beside its bound."""
    return {
        "batch": batch,
        "ms": round(step * 1e3, 3),
        "bound_ms": round(limit * 1e3, 3),
        "share_of_bound": round(limit / step, 3),
        "tokens_per_s": round(batch / step),
    }


def context(bench: Bench, batches: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Decode steps by context: 100 steady steps from an idle device to an idle device, the best of three."""
    steps, rows = bench.small(100, 4), []
    engine = bench.engine(max_model_len=min(bench.positions, 4096))
    for length in lengths:
        length = min(bench.small(length), engine.max_model_len - 3 * steps - 64)
        for batch in batches:
            with decoding(engine.core, batch, length, 3 * steps + 4) as requests:
                before = sum(len(r.token_ids) for r in requests) / batch
                step = min(timed_steps(engine.core, batch, steps) for _ in range(3)) / steps
                mean = (before + sum(len(r.token_ids) for r in requests) / batch) / 2
            rows.append({"context": round(mean), **step_row(batch, step, engine.bound.decode(batch, mean))})
            print("context", rows[-1], flush=True)
    return rows


def fusion(bench: Bench) -> dict[str, Any]:
    """A step of 29 rows over a step of one, at about 260 tokens of context; the bound of the ratio is that of bytes."""
    one, many = decode(bench, (1, 29))
    ratios = {"ratio": many["ms"] / one["ms"], "bound_ratio": many["bound_ms"] / one["bound_ms"]}
    result = {"rows": [one, many], **{name: round(value, 3) for name, value in ratios.items()}}
    print("fusion", result, flush=True)
    return result


def invariant(bench: Bench, batches: Sequence[int]) -> list[dict[str, Any]]:
    """What bits that do not depend on the batch cost, in decode steps."""
    default = decode(bench, batches)
    exact = decode(bench, batches, batch_invariant=True)
    rows = [{**row, "price": round(row["ms"] / usual["ms"], 2)} for row, usual in zip(exact, default)]
    print("invariant", rows, flush=True)
    return rows


def prefill(bench: Bench, shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    engine, rows = bench.engine(), []
    for count, length in shapes:
        length = bench.small(length)
        seconds = min(engine.run([(length, 1)] * count).duration for _ in range(4))
        limit = engine.bound.prefill(count, length)
        rows.append(
            {
                "prompts": count,
                "length": length,
                "ms": round(seconds * 1e3, 2),
                "bound_ms": round(limit * 1e3, 2),
                "share_of_flops": round(limit / seconds, 3),
                "tokens_per_s": round(count * length / seconds),
            }
        )
        print("prefill", rows[-1], flush=True)
    return rows


def paper(bench: Bench, intervals: Sequence[float]) -> list[dict[str, Any]]:
    """32 requests, 8 in and 504 out, at fixed intervals; and one alone."""
    engine, outputs = bench.engine(), bench.small(504, 4)
    engine.run([(8, 8)] * 32)
    alone = engine.run([(8, outputs)]).duration
    rows: list[dict[str, Any]] = [{"requests": 1, "makespan_s": round(alone, 3)}]
    for interval in intervals:
        arrivals = [i * interval / bench.scale for i in range(32)]
        makespan = engine.run([(8, outputs)] * 32, arrivals).duration
        after = makespan - arrivals[-1]
        rows.append(
            {"requests": 32, "interval_s": interval, "makespan_s": round(makespan, 3), "after_last_s": round(after, 3)}
        )
    print("paper", rows, flush=True)
    return rows


def anatomy(bench: Bench, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Kernels of steady decode steps, gaps inside and between them, host time."""
    engine, rows = bench.engine(), []
    for batch in batches:
        profile = profile_decode(engine.core, engine.bound, batch, bench.small(128), bench.small(20, 4))
        row = profile.to_json()
        row["anatomy"]["kernels"] = [{**k, "name": k["name"][:120]} for k in row["anatomy"]["kernels"][:24]]
        rows.append(row)
        print("anatomy", json.dumps(row, indent=1), flush=True)
    return rows


def transformers_process(name: str) -> None:
    """transformers' continuous batching over BATCH, in a process of its own; prints seconds, the best of two."""
    import transformers

    shape = {k: v for k, v in MODELS[name].items() if k != "architectures"}
    config = transformers.LlamaConfig(**shape, eos_token_id=None, bos_token_id=None)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    rng, best = random.Random(0), float("inf")
    for _ in range(2):
        ids = [[rng.randrange(config.vocab_size) for _ in range(n)] for n, _ in BATCH]
        started = time.perf_counter()
        outputs = model.generate_batch(inputs=ids, generation_config=settings)
        best = min(best, time.perf_counter() - started)
        assert sum(len(o.generated_tokens) for o in outputs.values()) == 128 * len(BATCH)
    print(best, flush=True)


def run_transformers(name: str) -> float | str:
    """Seconds of `transformers_process`, or why there are none. Before an engine takes the memory."""
    command = [sys.executable, __file__, "--model", name, "--transformers-process"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else f"failed: {done.stderr[-300:]}"


def against_transformers(bench: Bench) -> dict[str, Any]:
    """128 requests of 16-512 tokens, 128 tokens out, all at once."""
    bench.close()
    seconds = run_transformers(bench.name)
    engine = bench.engine()
    lengths = [(bench.small(n), bench.small(m, 2)) for n, m in BATCH]
    ours = min(engine.run(lengths).duration for _ in range(3))
    tokens, limit = sum(m for _, m in lengths), engine.bound.trace(lengths)
    result: dict[str, Any] = {
        "flover_tokens_per_s": round(tokens / ours),
        "bound_tokens_per_s": round(tokens / limit),
        "share_of_bound": round(limit / ours, 3),
        "transformers": seconds,
    }
    if isinstance(seconds, float):
        result |= {"transformers": round(tokens / seconds), "times_as_fast": round(seconds / ours, 1)}
    print("transformers", result, flush=True)
    return result


def parts(bench: Bench, batches: Sequence[int], count: int, intervals: Sequence[float]) -> dict[str, Callable[[], Any]]:
    """Each part by its name, in an order that starts few engines."""
    return {
        "decode": lambda: decode(bench, batches),
        "prefill": lambda: prefill(bench, [(1, 1000), (8, 1000)]),
        "fusion": lambda: fusion(bench),
        "anatomy": lambda: anatomy(bench, [b for b in (1, 32, 128) if b <= max(batches)]),
        "offline": lambda: offline(bench),
        "paper": lambda: paper(bench, intervals),
        "poisson": lambda: poisson(bench, (4, 16, 32)),
        "transformers": lambda: against_transformers(bench),
        "context": lambda: context(bench, [b for b in (1, 32) if b <= max(batches)], (512, 2000)),
        "invariant": lambda: invariant(bench, [b for b in (1, 32, 128) if b <= max(batches)]),
        "modes": lambda: modes(bench),
        "saturated": lambda: saturated(bench, count),
    }


PARTS = tuple(parts(None, (), 0, ()))  # type: ignore[arg-type]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--batches", default="1,8,16,32,64,128,256")
    parser.add_argument("--saturated", type=int, default=256, help="requests of the part of that name")
    parser.add_argument("--intervals", default="0,0.02,0.1,0.5", help="of the paper's workload, in seconds")
    parser.add_argument("--quantization", help="of EngineConfig, for every part")
    parser.add_argument("--kv-cache-dtype", help="of EngineConfig, for every part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide lengths and counts by it: only to see parts run")
    parser.add_argument("--transformers-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_MODEL.json")
    args = parser.parse_args(argv)
    args.only, args.batches = args.only.split(","), [int(b) for b in args.batches.split(",")]
    args.intervals = [float(interval) for interval in args.intervals.split(",")]
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    options = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    args.given = {name: value for name, value in options.items() if value is not None}
    if missing := set(args.given) - {f.name for f in fields(EngineConfig)}:
        parser.error(f"this version of flover has no {', '.join(sorted(missing))}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.transformers_process:
        return transformers_process(args.model)
    name = "_".join(["gpu", args.model, *args.given.values()])
    output = args.output or RESULTS / f"{name}.json"
    usual = torch.bfloat16 if args.device == "cuda" else torch.float32
    dtype = PRODUCTS.get(args.quantization, usual)
    limits = heated(measured_limits(args.device, dtype), args.device, dtype)
    result: dict[str, Any] = {
        "environment": provenance(args.device, script=True),
        "measured_TB_per_s": round(limits.bandwidth / 1e12, 3),
        "measured_TFLOP_per_s": round(limits.flops / 1e12, 1),
        "sustained_TFLOP_per_s": round(limits.sustained / 1e12, 1),
        "model": args.model,
    }
    print(json.dumps(result, indent=1))
    with tempfile.TemporaryDirectory(prefix="flover-bench-") as temporary:
        bench = Bench(args.model, Path(temporary), limits, {"device": args.device, **args.given}, args.scale)
        engine = bench.engine()
        bound = engine.bound
        result |= {"start_up_s": round(engine.start_up, 1), "parameters_read": bound.parameters}
        result |= {"weight_bytes": bound.weight_bytes, "kv_bytes_per_token": sum(bound.kv_bytes)}
        del engine
        todo = parts(bench, args.batches, args.saturated, args.intervals)
        for part in args.only:
            result[part] = todo[part]()
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
        bench.close()


if __name__ == "__main__":
    main()
