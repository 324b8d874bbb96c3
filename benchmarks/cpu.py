"""Speed on a CPU, in one run: throughput beside transformers, host time per step, the price of batch_invariant.

    python benchmarks/cpu.py            # about 20 minutes on 2 cores; writes benchmarks/results/cpu.json
    python benchmarks/cpu.py --quick    # the same in small, under a minute; writes nothing unless --output is given

Throughput: random models of real shapes, fp32, the same threads for all; requests arrive all at once as token ids,
greedy, EOS ignored, prefix caching off. Output tokens per second counts the tokens that were asked for and no others.
Contenders take turns and the order rotates, each in a process of its own, since two that use OpenMP from different
threads slow each other down; loading and a warm-up run are not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from flover.bench.keep import provenance
from flover.config import EngineConfig
from flover.engine.batch import BatchPlan, StepResult, encode_plan
from flover.engine.engine import EngineCore
from flover.request import Request, RowSampling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = Path(__file__).parent / "results" / "cpu.json"
LENGTHS = (16, 256)  # of prompts and of outputs, uniform
MODEL_LEN = 1024


class Job(NamedTuple):
    prompt: list[int]
    num_outputs: int


Tokens = list[list[int]]
Contender = Callable[[Sequence[Job]], Tokens]


def jobs(count: int, lengths: tuple[int, int], vocab: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    return [
        Job([rng.randrange(vocab) for _ in range(rng.randint(*lengths))], rng.randint(*lengths)) for _ in range(count)
    ]


# ---- models ----------------------------------------------------------------------------------------------------------


def save_model(name: str, small: bool, folder: Path) -> Path:
    """A seeded random checkpoint: GPT-2 small's shape, or that of JackFram/llama-160m.

    initializer_range 0.2 instead of 0.02: at the default the logits are so flat that a greedy token says little.
    """
    torch.manual_seed(0)
    common = {"initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None}
    layers, width = (2, 192) if small else (12, 768)
    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=width // 64, n_positions=MODEL_LEN, **common
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=MODEL_LEN,
            **common,
        )
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / name)
    return folder / name


# ---- flover ----------------------------------------------------------------------------------------------------------


def flover_contender(folder: Path, threads: int, **settings: Any) -> Contender:
    """The engine's loop with default settings but those of the comparison."""
    core = EngineCore(
        EngineConfig(str(folder), dtype="float32", enable_prefix_caching=False, num_threads=threads, **settings)
    )

    def run(work: Sequence[Job]) -> Tokens:
        requests = [
            Request(str(i), list(job.prompt), RowSampling(seed=0, temperature=0.0), job.num_outputs)
            for i, job in enumerate(work)
        ]
        for request in requests:
            core.add(request)
        while core.has_unfinished():
            core.step()
        return [request.output_token_ids for request in requests]

    return run


# ---- transformers ----------------------------------------------------------------------------------------------------


def _generate(model: Any, ids: list[list[int]], num_outputs: int, **options: Any) -> Any:
    """`generate`, left-padded, exactly num_outputs tokens a row: `[rows, num_outputs]`."""
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.inference_mode():
        out = model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=num_outputs, pad_token_id=0, **options
        )
    assert out.shape[1] == width + num_outputs
    return out[:, width:]


def one_by_one(model: Any) -> Contender:
    return lambda work: [_generate(model, [job.prompt], job.num_outputs)[0].tolist() for job in work]


def static_batch(model: Any) -> Contender:
    """One padded batch, as long as its longest request; a static cache is twice as fast here as the default."""

    def run(work: Sequence[Job]) -> Tokens:
        longest = max(job.num_outputs for job in work)
        out = _generate(model, [job.prompt for job in work], longest, cache_implementation="static").tolist()
        return [row[: job.num_outputs] for row, job in zip(out, work)]

    return run


def continuous_batch(model: Any) -> Contender:
    """What `generate_batch` wraps, one level below, since that takes one max_new_tokens for all requests.

    Its start-up (cache, thread) is not counted. The settings are those that were fastest here on a CPU: SDPA, no search
    for shared prefixes, and at most 256 tokens a step, since its mask and scores are tokens x all cached tokens.
    """
    from transformers.generation import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0, eos_token_id=-1)

    def run(work: Sequence[Job]) -> Tokens:
        hints = WorkloadHints(
            max_prompt_length=max(len(job.prompt) for job in work),
            max_generated_length=max(job.num_outputs for job in work),
            num_requests=len(work),
        )
        settings = ContinuousBatchingConfig(
            allow_block_sharing=False, auto_switch_to_flash=False, max_batch_tokens=256, page_size=32, num_blocks=1024
        )
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings, workload_hints=hints
        ) as manager:
            started = time.perf_counter()
            ids = [manager.add_request(j.prompt, max_new_tokens=j.num_outputs, eos_token_id=-1) for j in work]
            done: dict[str, list[int]] = {}
            while len(done) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    done[result.request_id] = result.generated_tokens
                assert result is not None or manager.is_running(), "transformers' generation thread died"
            run.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
        return [done[i] for i in ids]

    return run


# ---- A: throughput ---------------------------------------------------------------------------------------------------


ONE_BY_ONE = "transformers one by one"
CONTENDERS = ("flover paged", "flover slab", ONE_BY_ONE, "transformers static batch", "transformers continuous")


def make_contender(name: str, path: Path, threads: int) -> Contender:
    if name == "flover paged":
        return flover_contender(path, threads)
    if name == "flover slab":
        return flover_contender(path, threads, kv_layout="slab", max_model_len=2 * LENGTHS[1])
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    makers = {ONE_BY_ONE: one_by_one, "transformers static batch": static_batch}
    return makers.get(name, continuous_batch)(hf)


def work_of(name: str, quick: bool) -> list[Job]:
    """The jobs of a contender: one by one gets every fourth, at which its rate stays the same."""
    work = jobs(8 if quick else 32, (4, 24) if quick else LENGTHS, 32000, seed=0)
    return work[::4] if name == ONE_BY_ONE and not quick else work


def run_alone(name: str, path: Path, args: argparse.Namespace) -> tuple[float, Tokens]:
    """A contender's seconds and tokens, from a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--model", str(path), "--threads", str(args.threads)]
    done = subprocess.run(command + ["--quick"] * args.quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["tokens"]


def contender_process(args: argparse.Namespace) -> None:
    """The other side of `run_alone`."""
    work = work_of(args.contender, args.quick)
    run = make_contender(args.contender, args.model, args.threads)
    run([Job(job.prompt[:16], 4) for job in work[:2]])
    started = time.perf_counter()
    tokens = run(work)
    seconds = getattr(run, "seconds", time.perf_counter() - started)
    print("\n" + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
    os._exit(0)  # transformers' generation thread may linger


def throughput(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders over the same jobs; flover's tokens against those of transformers one by one."""
    names = list(CONTENDERS)
    work, alone = work_of(names[0], args.quick), work_of(ONE_BY_ONE, args.quick)
    print(f"\n{name}: {len(work)} requests, seed 0, prompt/output tokens:")
    print("  " + " ".join(f"{len(job.prompt)}/{job.num_outputs}" for job in work))
    path = save_model(name, args.quick, folder)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    tokens: dict[str, Tokens] = {}

    def count(name: str) -> int:
        return sum(job.num_outputs for job in work_of(name, args.quick))

    def identical(name: str) -> float:
        """Share of the requests run one by one whose tokens are the same."""
        mine = tokens[name] if name == ONE_BY_ONE else [tokens[name][work.index(job)] for job in alone]
        return sum(a == b for a, b in zip(mine, tokens[ONE_BY_ONE])) / len(alone)

    for repeat in range(args.repeats):
        for n in names[repeat % len(names) :] + names[: repeat % len(names)]:
            if repeat and n == ONE_BY_ONE:
                continue  # minutes a run, and far from the best
            spent, tokens[n] = run_alone(n, path, args)
            seconds[n].append(spent)
            print(f"  {n:28} {spent:7.1f} s  {count(n) / spent:7.1f} tokens/s", flush=True)
    rows = {
        n: {
            "seconds": [round(s, 3) for s in seconds[n]],
            "output_tokens": count(n),
            "output_tokens_per_s": round(count(n) / statistics.median(seconds[n]), 2),
            "identical_to_one_by_one": identical(n),
        }
        for n in names
    }
    best = max(names[2:], key=lambda n: rows[n]["output_tokens_per_s"])
    base = rows[best]["output_tokens_per_s"]
    for n in names:
        rows[n]["times_best_of_transformers"] = round(rows[n]["output_tokens_per_s"] / base, 2)
    table(
        f"{name}: output tokens/s (median), times the best of transformers ({best}), requests equal to one by one",
        [
            (
                n,
                f"{r['output_tokens_per_s']:.1f}",
                f"{r['times_best_of_transformers']:.2f}x",
                f"{r['identical_to_one_by_one']:.0%}",
            )
            for n, r in rows.items()
        ],
    )
    return {
        "model": json.loads((path / "config.json").read_text()),
        "requests": [(len(job.prompt), job.num_outputs) for job in work],
        "prompt_tokens": sum(len(job.prompt) for job in work),
        "contenders": rows,
        "best_of_transformers": best,
    }


# ---- B: host time ----------------------------------------------------------------------------------------------------


class NullExecutor:
    """Encodes the plan as the real one does, and has the result at once: one token for every row."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self._tokens = [rng.integers(0, 50000, rows) for _ in range(16)]
        self._finite = np.ones(rows, dtype=np.bool_)
        self._turn = 0
        self.encode_plan: Callable[[BatchPlan], bytes] = encode_plan

    def submit(self, plan: BatchPlan) -> Any:
        self.encode_plan(plan)
        self._turn = (self._turn + 1) % len(self._tokens)
        k = plan.num_rows
        return _Ready(StepResult(self._tokens[self._turn][:k], self._finite[:k]))

    def reset(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class _Ready:
    def __init__(self, value: StepResult) -> None:
        self._value = value

    def result(self) -> StepResult:
        return self._value


def host_time(folder: Path, rows: int, steps: int) -> dict[str, Any]:
    """Microseconds of `EngineCore.step` in steady decode; paged, two stop ids a row, depth 1."""
    path = folder / "echo"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["EchoModel"],
                "vocab_size": 50257,
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 2048,
            }
        )
    )
    executor = NullExecutor(rows)
    config = EngineConfig(
        str(path), max_num_seqs=rows, max_num_batched_tokens=64 * rows, load_format="dummy", device="cpu"
    )
    core = EngineCore(config, executor)
    for i in range(rows):  # lengths differ, so that every step finds some rows at the edge of a block
        stop_ids = frozenset({100_000, 100_001})
        core.add(Request(str(i), [7] * (1 + i % 48), RowSampling(seed=i), 2000, stop_token_ids=stop_ids))
    spent: dict[str, list[float]] = {}
    for owner, name in ((core.scheduler, "schedule"), (executor, "encode_plan"), (core.scheduler, "update")):
        setattr(owner, name, _timed(getattr(owner, name), spent.setdefault(name, [])))
    total: list[float] = []
    gc.collect()
    for _ in range(steps + 100):
        started = time.perf_counter()
        core.step()
        total.append(time.perf_counter() - started)
    assert len(core.scheduler.table) == rows
    core.shutdown()
    return {
        "rows": rows,
        "steps": steps,
        "total": _microseconds(total[-steps:]),
        **{name.removesuffix("_plan"): _microseconds(values[-steps:]) for name, values in spent.items()},
    }


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        value = function(*args)
        spent.append(time.perf_counter() - started)
        return value

    return call


def _microseconds(values: list[float]) -> dict[str, float]:
    median, p99 = np.percentile(np.array(values) * 1e6, (50, 99)).round(1).tolist()
    return {"median": median, "p99": p99}


def host(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    results = [host_time(folder, rows, 200 if args.quick else 1000) for rows in (256, 1024)]
    parts = ("total", "schedule", "encode", "update")
    table(
        "host time per step in steady decode, us, median (p99)",
        [
            ("rows", *parts),
            *((str(r["rows"]), *(f"{r[p]['median']:.0f} ({r[p]['p99']:.0f})" for p in parts)) for r in results),
        ],
    )
    return results


# ---- C: batch_invariant ----------------------------------------------------------------------------------------------


def batch_invariant(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same engine with and without, in turns."""
    work = jobs(4 if args.quick else 16, (4, 16) if args.quick else (16, 64), 32000, seed=1)
    wanted = sum(job.num_outputs for job in work)
    path = folder / "llama"
    engines = {flag: flover_contender(path, args.threads, batch_invariant=flag) for flag in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for engine in engines.values():
        engine(work[:1])
    for _ in range(args.repeats):
        for flag, engine in engines.items():
            started = time.perf_counter()
            engine(work)
            seconds[flag].append(time.perf_counter() - started)
    rates = {flag: wanted / statistics.median(values) for flag, values in seconds.items()}
    price = rates[False] / rates[True]
    table(
        f"batch_invariant, llama, {len(work)} requests: output tokens/s",
        [("off", f"{rates[False]:.1f}"), ("on", f"{rates[True]:.1f}"), ("price", f"{price:.1f}x slower")],
    )
    return {
        "model": "llama",
        "requests": [(len(job.prompt), job.num_outputs) for job in work],
        "output_tokens_per_s": {"off": round(rates[False], 2), "on": round(rates[True], 2)},
        "times_slower": round(price, 2),
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for first, *rest in rows:
        print("  " + first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(rest, widths[1:])), flush=True)


def environment() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        **provenance("cpu", script=True),
        "cpu": names[0] if names else platform.processor(),
        "load_average_at_start": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few short requests: does it all still run?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of every contender but the slowest")
    parser.add_argument("--only", choices=("throughput", "host", "invariant"), help="one part")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu.json; with --quick: none")
    args = parser.parse_args()
    output = args.output or (None if args.quick else RESULTS)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.contender:
        contender_process(args)
    started = time.perf_counter()
    result: dict[str, Any] = {"environment": environment()}
    print(json.dumps(result["environment"], indent=1))
    with tempfile.TemporaryDirectory(prefix="flover-bench-") as temporary:
        folder = Path(temporary)
        if args.only in (None, "host"):
            result["host_time_us"] = host(folder, args)
        if args.only in (None, "throughput"):
            result["throughput"] = {}
            for name in ("gpt2", "llama"):
                result["throughput"][name] = throughput(folder, name, args)
                save(result, output)
                gc.collect()
        if args.only in (None, "invariant"):
            if args.only:
                save_model("llama", args.quick, folder)
            result["batch_invariant"] = batch_invariant(folder, args)
    result["minutes"] = round((time.perf_counter() - started) / 60, 1)
    print(f"\n{result['minutes']} minutes")
    save(result, output)


def save(result: dict[str, Any], output: Path | None) -> None:
    """What is known so far; a part takes minutes."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
