"""`flover plan --hardware`: what a model would take and give on machines that are not here, from the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from flover.cluster.cost import Batch, Cost, Memory
from flover.cluster.hardware import device
from flover.cluster.model import model_cost
from flover.config import EngineConfig, human
from flover.resolve import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from flover.sharding import divides

BATCHES = (1, 8, 32, 64, 128, 256, 512)


def run_cluster_plan(hardware: str, replicas: int, options: Mapping[str, Any]) -> int:
    """Print it; ValueError if the model cannot fit, after what is known has been printed."""
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {replicas}")
    config = EngineConfig(**options)
    folder, model = model_cost(config)
    cost = Cost(model, device(hardware), config.tensor_parallel_size, config.pipeline_parallel_size)
    tokens = config.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS
    memory = cost.memory(tokens, config.max_num_seqs or DEFAULT_MAX_NUM_SEQS)
    console = Console(highlight=False, soft_wrap=True)
    _print_memory(console, cost, memory, config, f"{folder} ({model.config.architecture}), {model.dtype} products")
    share = config.gpu_memory_utilization
    if memory.room(share) < memory.kv_token:
        raise ValueError(_too_large(cost, memory, share, tokens))
    limit = model.config.max_position_embeddings
    contexts = [n for n in (512, 2048, 8192, 32768) if n < limit] + [limit]
    _print_times(console, cost, memory, share, contexts)
    _print_rates(console, cost, memory, share, contexts, replicas)
    console.print(
        "\nPredicted, not measured: the model was fitted on one H200 (docs/distributed.md, Planning); links and other"
        " cards by datasheet and published latencies."
    )
    return 0


def _print_memory(console: Console, cost: Cost, memory: Memory, config: EngineConfig, name: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    ranks = cost.tp * cost.pp
    table.add_row("model", name)
    table.add_row("layout", f"tp {cost.tp} x pp {cost.pp} = {ranks} x {cost.device.name}")
    table.add_row("device memory", f"{human(memory.device)}, {config.gpu_memory_utilization:.0%} of it to take")
    table.add_row("weights", f"{human(memory.weights)} on the fullest rank")
    table.add_row("largest step", f"{human(memory.step)}, estimated")
    table.add_row("KV per token", f"{human(memory.kv_token)} a rank")
    left = memory.room(config.gpu_memory_utilization)
    table.add_row("KV cache", f"{human(left)} a rank" if left > 0 else f"none: {human(-left)} too much")
    console.print(table)


def _too_large(cost: Cost, memory: Memory, share: float, tokens: int) -> str:
    missing = human(memory.kv_token - memory.room(share))
    fits = [
        n
        for n in range(cost.tp + 1, cost.model.config.num_heads + 1)
        if divides(cost.model.config, n) and Cost(cost.model, cost.device, n, cost.pp).memory(tokens).room(share) > 0
    ]
    instead = f"tp={fits[0]} would fit" if fits else "more pp, quantization or a smaller model would"
    return f"{cost.device.name} with tp={cost.tp} pp={cost.pp} is {missing} too small: {instead}"


def _print_times(console: Console, cost: Cost, memory: Memory, share: float, contexts: list[int]) -> None:
    console.print("\ndecode, ms a step (-: does not fit); TTFT of one prompt of that length, alone")
    table = Table("rows", *(f"{n} tokens" for n in contexts), box=None, pad_edge=False)
    for rows in BATCHES:
        cells = [f"{cost.decode(rows, n) * 1e3:.2f}" if rows <= memory.rows(n, share) else "-" for n in contexts]
        table.add_row(str(rows), *cells)
    table.add_row("fit", *(str(memory.rows(n, share)) for n in contexts))
    table.add_row("TTFT, ms", *(_digits(cost.prefill(n - 1) * 1e3) for n in contexts))
    console.print(table)


def _digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.2f}"


def _print_rates(
    console: Console, cost: Cost, memory: Memory, share: float, contexts: list[int], replicas: int
) -> None:
    """Output tokens/s at the largest of BATCHES that fits, half of each context prompt and half output."""
    console.print("\noutput tokens/s when prompt and output are half of the context each, steps full")
    table = Table("context", "rows", "a replica", f"{replicas} replicas", "a device", box=None, pad_edge=False)
    for context in contexts:
        rows = max((n for n in BATCHES if n <= memory.rows(context, share)), default=0)
        if not rows:
            table.add_row(str(context), "0", "-", "-", "-")
            continue
        half = context / 2
        batch = Batch(rows, rows * 0.75 * context, prefill=rows, pairs=rows * half / 2, ending=rows / half)
        rate = rows / cost.step(batch)  # each row that leaves brings a prompt as long as its output: one token a step
        table.add_row(
            str(context), str(rows), f"{rate:,.0f}", f"{rate * replicas:,.0f}", f"{rate / cost.tp / cost.pp:,.0f}"
        )
    console.print(table)
