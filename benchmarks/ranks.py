r"""Several GPUs: a decode step by the number of ranks, and what a sum over ranks costs.

    python benchmarks/ranks.py                                    # llama3-8b on 1 and 2 GPUs
    python benchmarks/ranks.py --model llama-65b --batches 8 --max-model-len 512 --gpu-memory-utilization 0.97 \
        --only decode --output benchmarks/results/gpu_tp_llama-65b.json
    python benchmarks/ranks.py --stages --only decode,prefill     # each rank is a stage of a pipeline

Weights, lengths and bounds as in gpu.py; the bound is that of one rank's share, of the last stage's where ranks are
stages, of which a decode step takes all, one after the other. `speed_up` is over one rank, or over the fewest that were
measured; `efficiency` is that over the number of ranks. `sums`: microseconds of a bf16 sum over all ranks inside a CUDA
graph, by NCCL, by one shot through shared memory, and as part of the norm that reads it, beside the same norm of a sum
that is there already. Writes benchmarks/results/gpu_tp.json, with --stages gpu_pp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from _gpu_engine import MODELS, Bench
from torch._C._distributed_c10d import TCPStore

from flover.bench.keep import provenance
from flover.bound import measured_limits
from flover.engine.peers import open_exchange
from flover.kernels.triton import rms_norm
from flover.parallel import ProcessGroup, connect
from gpu import RESULTS, decode, prefill

ROWS = (1, 8, 32, 64, 128, 256)
PROMPTS = ((1, 1000), (8, 1000))  # number, tokens of each


def replayed(function: Callable[[], Any], repeats: int = 20) -> float:
    """Microseconds of one call, of many in a graph; all ranks do the same."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(repeats):
            function()
        graph.capture_end()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        best = float("inf")
        for _ in range(10):
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 5 / repeats * 1e3)
    return round(best, 2)


def sums_of(rank: int, size: int, port: int, hidden: int, results: Any) -> None:
    """One rank of `sums`."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store: Any = TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    group = connect(store, rank, size, device, "127.0.0.1")
    assert isinstance(group, ProcessGroup)
    exchange = open_exchange(store, rank, size, device)
    rows = []
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    for count in ROWS:
        torch.manual_seed(rank)
        part = torch.randn(count, hidden, device=device).to(torch.bfloat16)
        stream = torch.zeros_like(part)
        row: dict[str, Any] = {"rows": count, "bytes": part.nbytes}
        expected = group.all_reduce(part.clone())
        row["nccl_us"] = replayed(partial(group.all_reduce, part))
        part = torch.randn(count, hidden, device=device).to(torch.bfloat16)
        if exchange is not None:
            torch.manual_seed(rank)
            part.copy_(torch.randn(count, hidden, device=device))
            for _ in range(50):
                assert torch.equal(exchange.all_reduce(part), expected), f"wrong at {count} rows"
            row["one_shot_us"] = replayed(partial(exchange.all_reduce, part))
            norm = partial(rms_norm, stream, weight, 1e-5, residual=part)
            row["in_norm_us"] = replayed(partial(norm, exchange=exchange))
            row["norm_us"] = replayed(norm)
        rows.append(row)
        if rank == 0:
            print("sums", row, flush=True)
    if rank == 0:
        results.put(rows)
    group.close()


def sums(size: int, hidden: int) -> list[dict[str, Any]]:
    """What a sum over `size` ranks costs, by rows of `hidden`."""
    store: Any = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=sums_of, args=(i, size, store.port, hidden, results)) for i in range(size)]
    for process in ranks:
        process.start()
    rows: list[dict[str, Any]] = results.get(timeout=240)
    for process in ranks:
        process.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--stages", action="store_true", help="ranks are stages of a pipeline, not tensor-parallel")
    parser.add_argument("--only", default="sums,decode", help="of sums, decode, prefill")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    output: Path = args.output or RESULTS / ("gpu_pp.json" if args.stages else "gpu_tp.json")
    size_of = "pipeline_parallel_size" if args.stages else "tensor_parallel_size"
    ranks, batches = ([int(n) for n in text.split(",")] for text in (args.ranks, args.batches))
    limits = measured_limits("cuda", torch.bfloat16)
    result: dict[str, Any] = {
        "environment": provenance("cuda", script=True) | {"gpus": torch.cuda.device_count()},
        "measured_TB_per_s": round(limits.bandwidth / 1e12, 3),
        "measured_TFLOP_per_s": round(limits.flops / 1e12, 1),
        "model": args.model,
    }
    print(json.dumps(result, indent=1), flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    only = args.only.split(",")
    if "sums" in only:
        hidden = int(MODELS[args.model].get("hidden_size", MODELS[args.model].get("n_embd", 0)))
        result["sums"] = sums(max(ranks), hidden)
        output.write_text(json.dumps(result, indent=1) + "\n")
    steps = [part for part in ("decode", "prefill") if part in only]
    for size in ranks if steps else ():
        with tempfile.TemporaryDirectory(prefix="flover-bench-") as temporary:
            given = {"device": "cuda", size_of: size}
            settings = {"max_model_len": args.max_model_len, "max_num_seqs": max(batches)}
            settings["gpu_memory_utilization"] = args.gpu_memory_utilization
            bench = Bench(args.model, Path(temporary), limits, given | settings)
            for part in steps:
                rows = prefill(bench, PROMPTS) if part == "prefill" else decode(bench, batches)
                first = result.setdefault(part, {}).get(str(ranks[0]), rows)
                for row, one in zip(rows, first):
                    row["speed_up"] = round(one["ms"] / row["ms"], 3)
                    row["efficiency"] = round(one["ms"] / row["ms"] * ranks[0] / size, 3)
                result[part][str(size)] = rows
                print(part, "ranks", size, rows, flush=True)
                output.write_text(json.dumps(result, indent=1) + "\n")
            bench.close()
    os._exit(0)  # no thread of a group is waited for


if __name__ == "__main__":
    main()
