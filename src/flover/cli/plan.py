"""`flover plan`: what a model needs and how much of it fits, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from flover.config import EngineConfig, ResolvedConfig, human
from flover.engine.engine import settle, survey
from flover.resolve import effective_dtype, kv_bytes_per_token, kv_dtype, of_a_stage

LENGTHS = tuple(1 << n for n in range(7, 21))


def run_plan(options: Mapping[str, Any]) -> int:
    """Print it; ValueError if it cannot work, after what is known has been printed."""
    config = EngineConfig(**options)
    folder, model, hardware, weights = survey(config)
    dtype = effective_dtype(config, model, hardware.device)
    cache_dtype = kv_dtype(config, dtype)
    token_bytes = kv_bytes_per_token(of_a_stage(config, model), cache_dtype, config.tensor_parallel_size)
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("model", f"{folder} ({model.architecture})")
    table.add_row(
        "shape",
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads,"
        f" {model.num_kv_heads} KV heads of {model.head_dim}, vocabulary {model.vocab_size}",
    )
    table.add_row("dtype", dtype)
    table.add_row("weights", human(weights) + ("" if config.quantization == "none" else f" ({config.quantization})"))
    table.add_row("KV per token", f"{human(token_bytes)} ({token_bytes} bytes, {cache_dtype})")
    table.add_row("free", f"{human(hardware.free_bytes)} on {hardware.device}")
    console.print(table)
    resolved = settle(config, folder, model, hardware, weights)
    if resolved.memory.step:
        console.print(f"largest step   {human(resolved.memory.step)}, measured")
    _print_capacity(console, resolved, hardware.free_bytes - weights - resolved.memory.step)
    return 0


def _print_capacity(console: Console, resolved: ResolvedConfig, free: int) -> None:
    kv, limit = resolved.kv, resolved.scheduler
    size = kv.num_blocks * kv.block_size * kv.bytes_per_token
    console.print(
        f"\nKV cache: {kv.layout}, {kv.num_blocks} blocks of {kv.block_size} tokens, {human(size)};"
        f" at most {limit.max_num_seqs} requests at a time, {limit.max_model_len} tokens each"
    )
    table = Table("tokens each", "fit in this cache", "fit in all free memory", box=None, pad_edge=False)
    for length in sorted({n for n in LENGTHS if n < limit.max_model_len} | {limit.max_model_len}):
        here = kv.num_blocks if kv.layout == "slab" else kv.num_blocks // -(-length // kv.block_size)
        table.add_row(
            str(length), str(min(here, limit.max_num_seqs)), str(max(free, 0) // (length * kv.bytes_per_token))
        )
    console.print(table)
