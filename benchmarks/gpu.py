"""Speed on one GPU: decode by batch, prefill, offline throughput, the paper's workload, where a step's time goes.

    python benchmarks/gpu.py --model llama3-8b    # everything, a few minutes; writes benchmarks/results/gpu_*.json
    python benchmarks/gpu.py --model gptj-6b --only decode,anatomy

Random weights at true shapes, bf16, greedy, token-id prompts, EOS ignored, prefix caching off. Each decode figure is
(time of 256 new tokens - time of 16) / 240 for B prompts of 128 tokens, and stands beside its bound:
max(weight bytes / BW, 2 P B / F) + live KV bytes / BW, with BW (a sum over 8 GB) and F (an 8192^3 bf16 product)
measured in the same run. Weight bytes leave out the token embedding, of which a step reads only a few rows.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flover
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.request import Request, RowSampling

RESULTS = Path(__file__).parent / "results"


def llama(hidden: int, size: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "llama2-7b": llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-13b": llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "gptj-6b": {
        "architectures": ["GPTJForCausalLM"],
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
    },
    "gpt2-xl": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
    "tiny": llama(128, 256, 2, 4, 2, 1000, 2048),
}
PARTS = ("decode", "prefill", "offline", "paper", "anatomy", "transformers")


class Engine:
    """A core with random weights, and the clock around what it runs."""

    def __init__(self, name: str, folder: Path, **settings: Any) -> None:
        path = folder / name
        path.mkdir(exist_ok=True)
        self.vocab = MODELS[name]["vocab_size"]
        (path / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
        started = time.perf_counter()
        self.core = EngineCore(EngineConfig(str(path), load_format="dummy", enable_prefix_caching=False, **settings))
        self.start_up = time.perf_counter() - started
        self._rng = random.Random(0)

    def requests(self, lengths: Sequence[tuple[int, int]]) -> list[Request]:
        ids = [[self._rng.randrange(self.vocab) for _ in range(n)] for n, _ in lengths]
        return [
            Request(str(i), prompt, RowSampling(seed=0, temperature=0.0), outputs)
            for i, (prompt, (_, outputs)) in enumerate(zip(ids, lengths))
        ]

    def run(self, lengths: Sequence[tuple[int, int]], interval: float = 0.0) -> tuple[float, list[Request]]:
        """Seconds from the first arrival to the last token; request i arrives at i * interval seconds."""
        core, requests = self.core, self.requests(lengths)
        waiting = list(reversed(requests))
        started = core.clock()
        while waiting or core.has_unfinished():
            now = core.clock() - started
            while waiting and (len(requests) - len(waiting)) * interval <= now:
                core.add(waiting.pop())
            if core.has_unfinished():
                core.step()
        return core.clock() - started, requests


def measured_limits() -> tuple[float, float]:
    """Bytes/s of a sum over 8 GB, FLOP/s of an 8192^3 bf16 product."""
    data = torch.empty(2 << 30, dtype=torch.float32, device="cuda").normal_()
    read, nbytes = timed(data.sum), data.numel() * 4
    del data
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    product = timed(lambda: a @ b)
    return nbytes / read, 2 * 8192**3 / product


def timed(function: Any, repeats: int = 9) -> float:
    function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


class Bound:
    """Bytes and FLOPs that a step cannot do without, and the seconds they take at the measured limits."""

    def __init__(self, engine: Engine, bandwidth: float, flops: float) -> None:
        runner: Any = engine.core._executor._runner  # type: ignore[attr-defined]
        config = engine.core.resolved
        seen = {p.data_ptr(): p for p in runner.model.parameters()}
        self.parameters = sum(p.numel() for p in seen.values())
        self.weight_bytes = sum(p.numel() * p.element_size() for p in seen.values())
        if not config.model.tie_word_embeddings:
            self.parameters -= config.model.vocab_size * config.model.hidden_size
            self.weight_bytes -= 2 * config.model.vocab_size * config.model.hidden_size
        self.head = config.model.vocab_size * config.model.hidden_size
        self.token_bytes = config.kv.bytes_per_token
        self.bandwidth, self.flops, self.model = bandwidth, flops, config.model

    def decode(self, batch: int, context: float) -> float:
        weights = max(self.weight_bytes / self.bandwidth, 2 * self.parameters * batch / self.flops)
        return weights + batch * context * self.token_bytes / self.bandwidth

    def prefill(self, count: int, length: int) -> float:
        m = self.model
        products = 2 * (self.parameters - self.head) * count * length + 2 * self.head * count
        attention = 2 * 2 * m.num_layers * m.num_heads * m.head_dim * count * length * length / 2
        return (products + attention) / self.flops


def decode(engine: Engine, bound: Bound, batches: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        engine.run([(128, 16)] * batch)  # capture
        short = min(engine.run([(128, 16)] * batch)[0] for _ in range(3))
        long = min(engine.run([(128, 256)] * batch)[0] for _ in range(2))
        step = (long - short) / 240
        limit = bound.decode(batch, 128 + 136)
        rows.append(
            {
                "batch": batch,
                "ms": round(step * 1e3, 3),
                "bound_ms": round(limit * 1e3, 3),
                "share_of_bound": round(limit / step, 3),
                "tokens_per_s": round(batch / step),
            }
        )
        print("decode", rows[-1], flush=True)
    return rows


def prefill(engine: Engine, bound: Bound, shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for count, length in shapes:
        seconds = min(engine.run([(length, 1)] * count)[0] for _ in range(4))
        limit = bound.prefill(count, length)
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


def offline(engine: Engine) -> dict[str, Any]:
    """512 requests at once, prompts uniform 32-1024, outputs uniform 32-512."""
    rng = random.Random(0)
    lengths = [(rng.randint(32, 1024), rng.randint(32, 512)) for _ in range(512)]
    engine.run([(n, min(m, 8)) for n, m in lengths[:64]])
    seconds, requests = engine.run(lengths)
    outputs = sum(m for _, m in lengths)
    result = {
        "requests": len(lengths),
        "prompt_tokens": sum(n for n, _ in lengths),
        "output_tokens": outputs,
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(outputs / seconds),
    }
    assert sum(r.num_output_tokens for r in requests) == outputs
    print("offline", result, flush=True)
    return result


def paper(engine: Engine, intervals: Sequence[float]) -> list[dict[str, Any]]:
    """32 requests, 8 in and 504 out, at fixed intervals; and one alone."""
    engine.run([(8, 8)] * 32)
    alone = engine.run([(8, 504)])[0]
    rows = [{"requests": 1, "makespan_s": round(alone, 3)}]
    for interval in intervals:
        makespan, _ = engine.run([(8, 504)] * 32, interval)
        rows.append({"requests": 32, "interval_s": interval, "makespan_s": round(makespan, 3)})
    print("paper", rows, flush=True)
    return rows


def anatomy(engine: Engine, batch: int) -> dict[str, Any]:
    """Kernels of steady decode steps: microseconds a step, launches a step, share; and what lies between them."""
    core, steps = engine.core, 20
    for request in engine.requests([(128, 120)] * batch):
        core.add(request)
    for _ in range(60):
        core.step()
    torch.cuda.synchronize()
    host = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            core.step()
        torch.cuda.synchronize()
    host = time.perf_counter() - host
    while core.has_unfinished():
        core.step()
    events = sorted(
        (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda e: e.time_range.start,
    )
    busy: defaultdict[str, list[float]] = defaultdict(list)
    covered, gap, end = 0.0, 0.0, events[0].time_range.start
    for event in events:
        busy[event.name].append(event.time_range.elapsed_us())
        gap += max(0.0, event.time_range.start - end)
        covered += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    kernels = [
        {"kernel": name[:90], "us": round(sum(t) / steps, 1), "launches": round(len(t) / steps, 1)}
        for name, t in sorted(busy.items(), key=lambda item: -sum(item[1]))
    ]
    result = {
        "batch": batch,
        "span_us": round((covered + gap) / steps, 1),
        "busy_us": round(covered / steps, 1),
        "gaps_us": round(gap / steps, 1),
        "kernels": kernels[:24],
    }
    print("anatomy", json.dumps(result, indent=1), flush=True)
    return result


BATCH = [(random.Random(i).randint(16, 512), 128) for i in range(128)]  # what `generate_batch` is compared on


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


def against_transformers(engine: Engine, seconds: float | str) -> dict[str, Any]:
    """128 requests of 16-512 tokens, 128 tokens out, all at once."""
    ours = min(engine.run(BATCH)[0] for _ in range(3))
    tokens = sum(m for _, m in BATCH)
    result: dict[str, Any] = {"flover_tokens_per_s": round(tokens / ours), "transformers": seconds}
    if isinstance(seconds, float):
        result |= {"transformers": round(tokens / seconds), "times_as_fast": round(seconds / ours, 1)}
    print("transformers", result, flush=True)
    return result


def environment() -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flover": flover.__version__,
        "commit": commit or None,
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--batches", default="1,8,16,32,64,128,256")
    parser.add_argument("--engine", type=json.loads, default={}, help='more settings, as {"quantization": "fp8"}')
    parser.add_argument("--transformers-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_MODEL.json")
    args = parser.parse_args()
    if args.transformers_process:
        return transformers_process(args.model)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    batches = [int(b) for b in args.batches.split(",")]
    output = args.output or RESULTS / f"gpu_{'_'.join([args.model, *map(str, args.engine.values())])}.json"
    bandwidth, flops = measured_limits()
    result: dict[str, Any] = {
        "environment": environment(),
        "measured_TB_per_s": round(bandwidth / 1e12, 3),
        "measured_TFLOP_per_s": round(flops / 1e12, 1),
    }
    print(json.dumps(result, indent=1))
    gc.collect()
    torch.cuda.empty_cache()
    theirs: float | str = "not run"
    if "transformers" in wanted:  # before the engine takes the memory
        command = [sys.executable, __file__, "--model", args.model, "--transformers-process"]
        done = subprocess.run(command, capture_output=True, text=True)
        theirs = float(done.stdout.split()[-1]) if done.returncode == 0 else f"failed: {done.stderr[-300:]}"
    with tempfile.TemporaryDirectory(prefix="flover-bench-") as temporary:
        length = min(2048, MODELS[args.model].get("n_positions", MODELS[args.model].get("max_position_embeddings")))
        settings = {"max_model_len": length, "max_num_seqs": 256, "max_num_batched_tokens": 8192, **args.engine}
        engine = Engine(args.model, Path(temporary), **settings)
        bound = Bound(engine, bandwidth, flops)
        result |= {
            "model": args.model,
            "settings": args.engine,
            "start_up_s": round(engine.start_up, 1),
            "parameters_read": bound.parameters,
        }
        parts = {
            "decode": lambda: decode(engine, bound, batches),
            "prefill": lambda: prefill(engine, bound, [(1, 1000), (8, 1000)]),
            "offline": lambda: offline(engine),
            "paper": lambda: paper(engine, (0.0, 0.02, 0.1, 0.5)),
            "anatomy": lambda: [anatomy(engine, b) for b in (1, 32, 128)],
            "transformers": lambda: against_transformers(engine, theirs),
        }
        for part in wanted:
            result[part] = parts[part]()
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
        engine.core.shutdown()


if __name__ == "__main__":
    main()
