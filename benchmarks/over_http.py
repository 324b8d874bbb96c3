"""What HTTP costs: one load driven in process and through `flover serve`, and the time to a lone request's first token.

    python benchmarks/over_http.py --model llama3-8b --out benchmarks/results/over_http_llama3-8b.json    # on a GPU
    python benchmarks/over_http.py --model tiny --device cpu --scale 16 --out over_http.json    # do all parts run?

Random weights at a true shape; greedy, EOS ignored, token-id prompts, prefix caching off, the same settings and the
same requests in each way; each way is a fresh start in a process of its own. The tokenizer is the built-in model's,
with a made-up word for every further id of the vocabulary, so that each token is text: it is detokenized and sent as an
event of its own. Ways:

core       `EngineCore` in one process: tokens only, no text, once
generate   `LLM.generate` there: with text, no streaming
http       `flover serve`, streamed completions, from `--clients` processes; all connect at once, one request each

The load: 512 requests at once, prompts uniform 32-1024 tokens, outputs uniform 32-512. Throughput is output tokens over
the time from the first request to the last token, the best of `--repeats` after a small warm-up. The lone requests have
128 tokens in and 16 out and come one after the other; their first token is timed from the call of `LLM.stream`
(the engine in the same process), and from before the body is encoded to the first event with text over a connection
that is kept: what HTTP adds includes the way to the engine's process and back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from _http_clients import at_once, one_by_one

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from serving import serve

START = 3.0  # seconds for the clients' processes to be ready
Jobs = list[tuple[list[int], int]]  # prompt, output length


def make_folder(folder: Path, name: str) -> int:
    """A checkpoint without weights; -> its vocabulary's size."""
    from _gpu_engine import MODELS  # imports torch, which the clients do not need

    import flover

    config = MODELS[name]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    builtin = Path(flover.__file__).parent / "builtin" / "kjv-llama"
    tokenizer = json.loads((builtin / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"Ġword{i}": i for i in range(len(words), config["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text((builtin / "tokenizer_config.json").read_text())
    return int(config["vocab_size"])


def make_jobs(vocab: int, scale: int, lone: int) -> tuple[Jobs, Jobs]:
    """The load, and the lone requests."""
    rng = random.Random(0)

    def job(num_prompt: int, num_output: int) -> tuple[list[int], int]:
        return [rng.randrange(vocab) for _ in range(num_prompt)], num_output

    def length(low: int, high: int) -> int:
        return rng.randint(max(1, low // scale), max(2, high // scale))

    many = [job(length(32, 1024), length(32, 512)) for _ in range(max(8, 512 // scale))]
    return many, [job(128, 16) for _ in range(lone)]


def small(jobs: Jobs) -> Jobs:
    """What warms up: kernels and shapes."""
    return [(prompt, min(num, 8)) for prompt, num in jobs[:64]]


def in_process(folder: str, settings: dict[str, Any], many: Jobs, lone: Jobs, repeats: int) -> dict[str, Any]:
    """`core` and `generate`, and the lone requests; for a process of its own."""
    from flover import LLM, SamplingParams
    from flover.bench.engines import as_request
    from flover.bench.keep import provenance
    from flover.bench.records import Job

    def params(jobs: Jobs) -> list[SamplingParams]:
        return [SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True) for _, num in jobs]

    with LLM(folder, **settings) as llm:

        def generate(jobs: Jobs) -> float:
            begin = time.monotonic()
            outputs = llm.generate([prompt for prompt, _ in jobs], params(jobs), use_tqdm=False)
            seconds = time.monotonic() - begin
            assert [len(output.outputs[0].token_ids) for output in outputs] == [num for _, num in jobs]
            return seconds

        def core() -> float:
            requests = [as_request(i, Job(0.0, tuple(prompt), num)) for i, (prompt, num) in enumerate(many)]
            begin = time.monotonic()
            for request in requests:
                llm.engine.core.add(request)
            while llm.engine.core.has_unfinished():
                llm.engine.core.step()
            seconds = time.monotonic() - begin
            assert [request.num_output_tokens for request in requests] == [num for _, num in many]
            return seconds

        def first(prompt: list[int], num: int) -> tuple[float, str]:
            begin, seconds, text = time.monotonic(), 0.0, ""
            for output in llm.stream(prompt, params([(prompt, num)])[0]):
                text = output.outputs[0].text
                seconds = seconds or (time.monotonic() - begin if text else 0.0)
            return seconds, text

        generate(small(many))
        result = {"generate": [generate(many) for _ in range(repeats)], "core": [core()]}
        for job in lone[:5]:
            first(*job)
        times, texts = zip(*(first(*job) for job in lone))
        made_by = provenance(settings["device"], script=True)
        return {**result, "ttft": times, "texts": texts, "environment": made_by}


def options(settings: dict[str, Any]) -> Iterator[str]:
    """Of `flover serve`."""
    for name, value in settings.items():
        dashed = name.replace("_", "-")
        yield from (f"--{'' if value else 'no-'}{dashed}",) if isinstance(value, bool) else (f"--{dashed}", str(value))


def over_http(
    folder: str, settings: dict[str, Any], many: Jobs, lone: Jobs, repeats: int, clients: int
) -> dict[str, Any]:
    """`http`, and the lone requests."""
    spawn = multiprocessing.get_context("spawn")
    with (
        serve(folder, *options(settings), usual=()) as server,
        ProcessPoolExecutor(clients, mp_context=spawn) as pool,
    ):
        port, front = server.port, server.front

        def load(jobs: Jobs) -> dict[str, Any]:
            at, before = time.monotonic() + START, front.cpu_times()
            parts = [pool.submit(at_once, port, jobs[i::clients], at) for i in range(clients)]
            found, after = [part.result(timeout=600) for part in parts], front.cpu_times()
            begin, tokens = min(each["begin"] for each in found), sum(num for _, num in jobs)
            cpu = after.user + after.system - before.user - before.system
            seconds = max(each["end"] for each in found) - begin
            return {
                "seconds": seconds,
                "late_s": round(begin - at, 3),
                "events_per_token": round(sum(each["events"] for each in found) / tokens, 4),
                "front_cpu_us_per_token": round(cpu / tokens * 1e6, 1),
                "front_cpu_share": round(cpu / seconds, 3),
                "busiest_client_cpu_share": round(max(each["cpu_share"] for each in found), 3),
                "ttft_median_ms": round(statistics.median(chain.from_iterable(e["first"] for e in found)) * 1e3, 1),
            }

        load(small(many))
        loads = [load(many) for _ in range(repeats)]
        one_by_one(port, lone[:5])
        times, texts = one_by_one(port, lone)
        return {"loads": loads, "ttft": times, "texts": texts}


def throughput(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    return {"seconds": [round(each, 3) for each in seconds], "output_tokens_per_s": round(tokens / min(seconds))}


def latency(times: Sequence[float]) -> dict[str, float]:
    ranked = sorted(times)
    p90 = ranked[min(len(ranked) - 1, int(0.9 * len(ranked)))]
    return {"p50_ms": round(statistics.median(ranked) * 1e3, 3), "p90_ms": round(p90 * 1e3, 3)}


def report(inside: dict[str, Any], outside: dict[str, Any], many: Jobs) -> dict[str, Any]:
    """Both ways beside each other."""
    tokens, loads = sum(num for _, num in many), outside["loads"]
    best = min(loads, key=lambda load: load["seconds"])
    ways = {name: throughput(inside[name], tokens) for name in ("core", "generate")}
    ways["http"] = throughput([load["seconds"] for load in loads], tokens) | {
        k: v for k, v in best.items() if k[-7:] != "seconds"
    }
    rates = {name: way["output_tokens_per_s"] for name, way in ways.items()}
    first = {"in_process": latency(inside["ttft"]), "http": latency(outside["ttft"])}
    return {
        "requests": len(many),
        "prompt_tokens": sum(len(prompt) for prompt, _ in many),
        "output_tokens": tokens,
        "throughput": ways,
        "http_over_generate": round(rates["http"] / rates["generate"], 3),
        "http_over_core": round(rates["http"] / rates["core"], 3),
        "lone_requests": len(inside["ttft"]),
        "lone_same_text": sum(a == b for a, b in zip(inside["texts"], outside["texts"])),
        "ttft": first,
        "added_ttft_p50_ms": round(first["http"]["p50_ms"] - first["in_process"]["p50_ms"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", help="a shape of gpu.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quantization", help="of EngineConfig")
    parser.add_argument("--kv-cache-dtype", help="of EngineConfig")
    parser.add_argument("--clients", type=int, default=4, help="processes that send the load")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lone", type=int, default=50, help="requests that come one at a time")
    parser.add_argument("--scale", type=int, default=1, help="divide lengths and counts by it: only to see parts run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings: dict[str, Any] = {"device": args.device, "load_format": "dummy", "enable_prefix_caching": False}
    settings |= {"max_model_len": 2048, "max_num_seqs": 512, "max_num_batched_tokens": 8192, "order": "fair"}
    given = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    settings |= {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="flover-bench-") as folder:
        many, lone = make_jobs(make_folder(Path(folder), args.model), args.scale, args.lone)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            inside = pool.submit(in_process, folder, settings, many, lone, args.repeats).result()
        print({name: inside[name] for name in ("core", "generate")}, latency(inside["ttft"]), flush=True)
        outside = over_http(folder, settings, many, lone, args.repeats, args.clients)
    result = {"environment": inside["environment"], "model": args.model, "settings": settings, "clients": args.clients}
    result |= report(inside, outside, many)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
