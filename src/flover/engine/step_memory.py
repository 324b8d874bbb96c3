"""The memory of the largest step, measured before weights and cache are allocated.

Layers run one after the other in the same memory, so a model of one layer with random weights takes as much for a step
as the whole: it runs the heaviest step that the settings allow, and captures the largest graphs.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch

from flover.config import Hardware, ResolvedConfig, human
from flover.engine.batch import StepResult
from flover.engine.gpu_runner import GpuRunner
from flover.engine.scheduler import Scheduler
from flover.kv.paged import PagedLayout
from flover.models.loader import weight_bytes
from flover.parallel import Group
from flover.request import Request, RowSampling
from flover.resolve import resolve

DRIVER_BYTES = 256 << 20  # what CUDA keeps for graphs and kernels, outside of PyTorch's allocator
BLOCK = 16


def measure_step_bytes(config: ResolvedConfig, folder: Path, hardware: Hardware) -> int:
    """Bytes that the largest step takes beside weights and cache, with the graphs that are captured.

    Raises:
        ValueError: it does not fit even beside a single layer.
    """
    rows, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    prompt = max(min(tokens // rows, config.scheduler.max_model_len - 1), 1)
    probe = replace(
        config.engine,
        load_format="dummy",
        kv_layout="paged",
        block_size=BLOCK,
        num_kv_blocks=rows * (prompt // BLOCK + 2),
        kv_cache_memory_bytes=None,
        enable_prefix_caching=False,
        policy="fused",
        pipeline_parallel_size=1,
    )
    one = replace(config.model, num_layers=1)
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    group = Group(0, config.engine.tensor_parallel_size)
    weights = weight_bytes(folder, one, dtype, config.engine.quantization, group)
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    try:
        settled = resolve(probe, one, hardware, weights)
        _run_heaviest(settled, folder, prompt)
        peak = torch.cuda.max_memory_reserved() - before
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a step of max_num_batched_tokens={tokens} with max_num_seqs={rows} does not fit in the "
            f"{human(hardware.free_bytes)} that are free on the GPU; smaller ones would"
        ) from None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    lanes = 2 if config.scheduler.prefill_mode == "overlap" else 1  # PyTorch keeps the memory of each stream apart
    return lanes * max(peak - weights - settled.memory.kv, 0) + DRIVER_BYTES


def _run_heaviest(config: ResolvedConfig, folder: Path, prompt: int) -> None:
    """A budget of prompts, all sampled with filters and log-probabilities, one of them scored; then the graphs."""
    runner = GpuRunner(config, folder, group=Group(0, config.engine.tensor_parallel_size))
    scheduler = Scheduler(config.scheduler, config.kv, PagedLayout(config.kv.num_blocks, BLOCK), time.monotonic)
    sampling = RowSampling(seed=0, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, logprobs=20)
    for i in range(config.scheduler.max_num_seqs):
        scored = -1 if i else 20
        scheduler.add(Request(str(i), [0] * prompt, sampling, 2, prompt_logprobs=scored, logprobs=[]))
    while (step := scheduler.schedule()) is not None:
        result = runner.execute(step.plan)
        scheduler.update(step, result if isinstance(result, StepResult) else result.result())
    runner.capture_largest()
