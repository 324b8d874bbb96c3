"""From the start of a process to its first token, by phase, with the checkpoint in the page cache.

    python benchmarks/startup.py --model llama3-8b    # writes the checkpoint first; --folder takes one that is there
    python benchmarks/startup.py --model tiny --device cpu

Every figure is a fresh process, as `flover bench startup` has it: first with an empty Triton cache (`cold`), then with
the one that it left (`warm`, the median of several). Weights are random, bf16, at true shapes, in shards of at most
5 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flover.bench.keep import provenance
from flover.bench.startup import fresh

RESULTS = Path(__file__).parent / "results"
SHARD = 5_000_000_000  # bytes, at most
BLOCK = 32 << 20  # bytes that are random; the rest repeats them
SETTINGS = {"max_model_len": 2048, "max_num_seqs": 64}


def models() -> dict[str, dict[str, Any]]:
    """The Llama shapes of benchmarks/gpu.py."""
    from _gpu_engine import MODELS  # imports torch

    return {name: shape for name, shape in MODELS.items() if shape["architectures"] == ["LlamaForCausalLM"]}


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a Llama checkpoint, in the order in which they are stored."""
    hidden, size, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", [vocab, hidden]
    for i in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, outputs, inputs in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", size, hidden),
            ("mlp.up_proj", size, hidden),
            ("mlp.down_proj", hidden, size),
        ):
            yield f"{prefix}{name}.weight", [outputs, inputs]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocab, hidden]


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """config.json, shards and their index."""
    import torch

    (folder / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    block = memoryview((torch.randn(BLOCK // 2) * 0.02).bfloat16().view(torch.uint8).numpy())
    shards: list[list[tuple[str, list[int], int]]] = [[]]
    used = 0
    for name, dims in tensors(shape):
        nbytes = 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        if used + nbytes > SHARD:
            shards.append([])
            used = 0
        shards[-1].append((name, dims, nbytes))
        used += nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, dims, nbytes in shard:
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + nbytes]}
            at += nbytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb", buffering=0) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            while at:
                at -= out.write(block[: min(at, len(block))])
    total = sum(nbytes for shard in shards for _, _, nbytes in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_all(folder: Path) -> float:
    """Bring the checkpoint into the page cache; -> GB/s of reading it once more, on one thread."""
    buffer = memoryview(bytearray(BLOCK))
    for _ in range(2):
        total, begin = 0, time.perf_counter()
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total / 1e9 / (time.perf_counter() - begin)


def show(name: str, run: dict[str, Any]) -> None:
    print(f"\n{name}")
    for phase, seconds in run["phases_s"].items():
        size = run["nbytes"]["weights"] / 1e9
        amount = f"  {size:.3f} GB, {size / seconds:.2f} GB/s" if phase == "weights" else ""
        print(f"  {phase:<14}{seconds:8.3f} s{amount}")
    rest = run["ready_s"] - sum(run["phases_s"].values())
    for label, seconds in (("rest", rest), ("ready", run["ready_s"]), ("first token", run["first_token_s"])):
        print(f"  {label:<14}{seconds:8.3f} s")
    print(f"  {'second token':<14}{run['second_token_s']:8.3f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", help="a Llama shape of benchmarks/gpu.py")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there, instead of a random one")
    parser.add_argument("--directory", type=Path, help="where the random one is written; default: the temporary folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="warm processes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/startup_MODEL.json")
    args = parser.parse_args()
    name = args.folder.name if args.folder else args.model
    device = "cpu" if args.device == "cpu" else "cuda"
    result: dict[str, Any] = {
        "environment": provenance(device, script=True),
        "model": name,
        "settings": SETTINGS,
    }
    with (
        tempfile.TemporaryDirectory(prefix="flover-bench-", dir=args.directory) as made,
        tempfile.TemporaryDirectory(prefix="flover-triton-") as cache,
    ):
        folder = args.folder or Path(made)
        if args.folder is None:
            shapes = models()
            if args.model not in shapes:
                parser.error(f"unknown model {args.model}; known: {', '.join(shapes)}")
            begin = time.perf_counter()
            write_checkpoint(folder, shapes[args.model])
            print(f"wrote the checkpoint in {time.perf_counter() - begin:.1f} s", flush=True)
        result["page_cache_GB_per_s_one_thread"] = round(read_all(folder), 1)
        result["cold"] = fresh({"model": str(folder), "device": args.device, **SETTINGS}, cache)
        result["environment"] = provenance(result["cold"]["device"], script=True)
        show("empty Triton cache", result["cold"])
        runs = [fresh({"model": str(folder), "device": args.device, **SETTINGS}, cache) for _ in range(args.repeats)]
        middle = statistics.median_low(run["first_token_s"] for run in runs)
        result["warm"] = next(run for run in runs if run["first_token_s"] == middle)
        result["warm_first_token_s"] = sorted(run["first_token_s"] for run in runs)
        show(f"Triton cache filled, median of {args.repeats}", result["warm"])
    output = args.output or RESULTS / f"startup_{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    main()
