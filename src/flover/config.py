"""Settings: `EngineConfig` from the user, and what the parts of an engine are told in the end (`ResolvedConfig`).

Everything here is frozen; `flover.resolve` makes the effective settings of it, once. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from flover.model_config import ModelConfig

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FP8 = "float8_e4m3fn"  # of a KV cache only: one byte, +-448, no infinity
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", *DTYPE_BYTES),
    "kv_cache_dtype": ("auto", "fp8"),
    "kv_layout": ("paged", "slab"),
    "reorder": ("off", "move", "indirect"),
    "policy": ("fused", "serial", "static"),
    "order": ("fcfs", "priority", "shortest", "fair"),
    "prefill_mode": ("mixed", "separate", "overlap"),
    "device": ("auto", "cpu", "cuda"),
    "generation_config": ("auto", "none"),
    "load_format": ("auto", "dummy"),
    "quantization": ("none", "int8", "fp8", "int8_w8a8", "fp8_w8a8"),
}


LIMITS = {"max_num_seqs": 65_536, "block_size": 65_536, "num_threads": 4096}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a user may set; None and "auto" are decided by `resolve`.

    Args:
        model: built-in name, checkpoint folder or Hugging Face hub id.
        dtype: of weights and activations; auto is float32 on a CPU, the checkpoint's own on a GPU.
        kv_cache_dtype: of the KV cache: "auto" is `dtype`; "fp8" is float8_e4m3fn, scale 1, saturating at +-448.
        max_model_len: prompt + output limit in tokens; auto is the model's, cut to what the cache holds.
        max_num_seqs: rows of the running batch.
        max_num_batched_tokens: token budget of a step; decode rows always run, it bounds the prefill beside them.
        kv_layout: "paged" (blocks, prefix reuse) or "slab" (the paper's contiguous buffer).
        reorder: slab only: "off" (dead rows compute until an edge frees), "move" (compaction), "indirect" (no copies).
        tensor_parallel_size: ranks that compute the model together, each with a part of every layer and of the cache.
        pipeline_parallel_size: stages, each of some of the layers and of tensor_parallel_size ranks, for links that are
            too slow for tensor parallelism.
        num_kv_blocks: paged cache size in blocks of block_size; kv_cache_memory_bytes: in bytes. Give at most one.
        gpu_memory_utilization: share of the memory free on the GPU that weights, steps and cache may take together.
        batch_invariant: every logit bit-equal alone and fused, at the price of padding.
        seed: of requests that bring none.
        policy: "fused", or "serial" and "static" for comparison.
        order: who is admitted first; "fair": clients (API keys) share tokens, a priority is worth seconds of waiting.
        itl_budget: milliseconds that a step with decode rows may take; prefill beside them is cut to it.
        prefill_mode: "mixed" (prefill chunks share a step with decode), "separate" (they alternate) or "overlap" (as
            mixed, but on a GPU the prefill of a step runs on a stream of its own, beside its decode).
        overlap_depth: plans made ahead of the result in flight (0 or 1).
        generation_config: "auto" applies the checkpoint's sampling defaults, "none" does not.
        quantization: of the blocks' linear layers, done while loading. "int8", "fp8" (e4m3): weights of 8 bits, a scale
            per row, computed in dtype; "int8_w8a8", "fp8_w8a8": tokens too, with a scale each.
        debug_poison: fill freed KV with NaN, so that a stale read cannot pass.

    Raises:
        ValueError: naming the field, the value and what would work.
    """

    model: str = "kjv-llama"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_layout: str = "paged"
    reorder: str = "move"
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    seed: int = 0
    policy: str = "fused"
    order: str = "fcfs"
    itl_budget: float | None = None
    prefill_mode: str = "mixed"
    overlap_depth: int = 1
    device: str = "auto"
    generation_config: str = "auto"
    load_format: str = "auto"
    quantization: str = "none"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_threads: int | None = None
    record_timeline: bool = False
    debug_poison: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a name or a folder, got {self.model!r}")
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{spec.name} must be True or False, got {value!r}")
            if str(spec.type).startswith("int"):
                low = 0 if spec.name in ("seed", "overlap_depth") else 1
                optional = value is None and "None" in str(spec.type)
                if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                    raise ValueError(f"{spec.name} must be an integer of at least {low}, got {value!r}")
        for name, limit in LIMITS.items():
            if (getattr(self, name) or 0) > limit:
                raise ValueError(f"{name} must be at most {limit}, got {getattr(self, name)}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")
        budget = self.itl_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0):
            raise ValueError(f"itl_budget must be a number of milliseconds above 0, got {budget!r}")
        if self.overlap_depth > 1:
            raise ValueError(f"overlap_depth must be 0 or 1, got {self.overlap_depth}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        if self.num_kv_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("give num_kv_blocks or kv_cache_memory_bytes, not both")
        if self.num_kv_blocks is not None and self.kv_layout == "slab":
            raise ValueError("num_kv_blocks is for kv_layout='paged'; a slab is sized by max_num_seqs x max_model_len")

    @property
    def num_ranks(self) -> int:
        """Of all stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class KVConfig:
    """Shape of the cache: a slab is the case of one block per request."""

    layout: str
    reorder: str
    block_size: int
    num_blocks: int
    dtype: str  # a torch name
    bytes_per_token: int
    prefix_caching: bool
    debug_poison: bool = False

    @property
    def room(self) -> int:
        """Tokens of the longest request that it can hold."""
        return self.block_size * (self.num_blocks if self.layout == "paged" else 1)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fused"
    order: str = "fcfs"
    prefill_mode: str = "mixed"
    record_timeline: bool = False
    itl_budget: float | None = None


class Hardware(NamedTuple):
    """What the machine offers: device type and bytes free for weights and cache."""

    device: str
    free_bytes: int


class Setting(NamedTuple):
    """An effective value, where it came from (given, default, checkpoint, machine) and why."""

    name: str
    value: Any
    origin: str
    reason: str = ""


class MemoryPlan(NamedTuple):
    """Bytes on the device: free at start, for weights, for the largest step (activations, graphs), for the KV cache."""

    free: int
    weights: int
    step: int
    kv: int

    def __str__(self) -> str:
        left = human(self.free - self.weights - self.step - self.kv)
        step = f"largest step {human(self.step)}, " if self.step else ""  # not measured on a CPU
        return f"{human(self.free)} free: weights {human(self.weights)}, {step}KV cache {human(self.kv)}, {left} left"


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The effective settings; made once by `resolve`, never changed."""

    engine: EngineConfig
    model: ModelConfig
    scheduler: SchedulerConfig
    kv: KVConfig
    memory: MemoryPlan
    settings: tuple[Setting, ...]


def human(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
