"""Release and regrow of a slab on a GPU: milliseconds and bytes, by the pieces that a cache comes and goes in.

    python benchmarks/slab.py    # writes benchmarks/results/slab.json

The slab is that of Llama-3-8B, 64 caches of 128 slots of 2,048 tokens in bf16. A release waits for the steps that are
enqueued, here none; `beside_products_ms` is one while another stream computes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flover.bench.keep import provenance
from flover.kv import virtual_memory
from flover.kv.storage import KVStorage

SLOTS = (128, 12, 18, 27, 41, 62, 93, 128, 48, 72, 24, 4, 128, 64, 32, 16, 8, 4)  # reserved, one after the other


def free() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def milliseconds(function: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    return round((time.perf_counter() - started) * 1e3, 2)


def measure() -> dict[str, Any]:
    """With `virtual_memory.CHUNKS` as it is."""
    before = free()
    storage = KVStorage(32, 128, 2048, 8, 128, torch.bfloat16, torch.device("cuda", 0), "triton", elastic=True)
    result: dict[str, Any] = {"steps": [], "bytes_at_start": before - free()}
    reserved = 1
    for slots in SLOTS:
        start = free()
        spent = milliseconds(partial(storage.apply, [], [], slots))
        result["steps"].append({"from": reserved, "to": slots, "ms": spent, "bytes_back": free() - start})
        reserved = slots
    storage.apply([], [], 128)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for _ in range(200):
            a @ a
    started = time.perf_counter()
    storage.apply([], [], 64)
    result["beside_products_ms"] = round((time.perf_counter() - started) * 1e3, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "slab.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": provenance("cuda", script=True)}
    for chunks in (8, 32, 128):
        virtual_memory.CHUNKS = chunks
        result[f"chunks_{chunks}"] = measure()
        gc.collect()
        torch.cuda.empty_cache()
        print(chunks, json.dumps(result[f"chunks_{chunks}"]), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
