"""`resolve`: what the user gave and what the machine has become the effective settings, once.

Where each value came from is recorded (`flover ... --explain`). No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from flover.config import (
    DTYPE_BYTES,
    FP8,
    EngineConfig,
    Hardware,
    KVConfig,
    MemoryPlan,
    ResolvedConfig,
    SchedulerConfig,
    Setting,
    human,
)
from flover.model_config import ModelConfig
from flover.sharding import check_ranks, divides, local_kv_heads

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
CPU_KV_BYTES = 4 << 30  # reserved address range at most; pages are taken as they are written
CPU_MEMORY_SHARE = 0.9  # of what is free

Reasons = dict[str, tuple[str, str]]  # name of a setting -> origin, reason


def effective_dtype(config: EngineConfig, model: ModelConfig, device: str) -> str:
    """The dtype to compute in: as given; auto is float32 on a CPU and the checkpoint's own elsewhere."""
    if config.dtype != "auto":
        return config.dtype
    dtype = "float32" if device == "cpu" else model.dtype
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"checkpoint dtype {dtype!r} is not supported; give dtype as one of {', '.join(DTYPE_BYTES)}")
    return dtype


def kv_dtype(config: EngineConfig, dtype: str) -> str:
    """torch's name of the KV cache's dtype where the activations have `dtype`."""
    return FP8 if config.kv_cache_dtype == "fp8" else dtype


def of_a_stage(config: EngineConfig, model: ModelConfig) -> ModelConfig:
    """The model with as many layers as the largest stage has.

    Raises:
        ValueError: more stages than layers.
    """
    stages = config.pipeline_parallel_size
    if stages > model.num_layers:
        raise ValueError(f"pipeline_parallel_size={stages} is more than the model's {model.num_layers} layers")
    return replace(model, num_layers=-(-model.num_layers // stages))


def kv_bytes_per_token(model: ModelConfig, dtype: str, ranks: int = 1) -> int:
    """K and V of one token in all layers, in a rank's cache of `dtype`."""
    elements = model.kv_elements_per_token // model.num_kv_heads * local_kv_heads(model, ranks)
    return elements * (1 if dtype == FP8 else DTYPE_BYTES[dtype])


def memory_share(config: EngineConfig, device: str) -> float:
    """Of the free memory, what weights, steps and cache may take together."""
    return CPU_MEMORY_SHARE if device == "cpu" else config.gpu_memory_utilization


def resolve(
    config: EngineConfig, model: ModelConfig, hardware: Hardware, weights: int = 0, step: int = 0
) -> ResolvedConfig:
    """Decide every open setting, once.

    Args:
        weights: bytes that the weights will take on the device. step: that the largest step will, beside the cache.

    Raises:
        ValueError: a model or cache that cannot fit, saying by how much and what would.
    """
    device = hardware.device if config.device == "auto" else config.device
    dtype = effective_dtype(config, model, device)
    cache_dtype = kv_dtype(config, dtype)
    _check_parallel(config, model, device)
    token_bytes = kv_bytes_per_token(of_a_stage(config, model), cache_dtype, config.tensor_parallel_size)
    free = _room(config, model, hardware, device, dtype, weights, step)
    cache, why = _size_cache(config, model, device, free, token_bytes, weights)
    tokens = config.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS
    prefix = config.enable_prefix_caching and config.kv_layout == "paged"
    effective = replace(
        config,
        device=device,
        dtype=dtype,
        max_num_seqs=cache.seqs,
        max_model_len=cache.length,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=prefix,
    )
    why["device"] = ("machine", "a CUDA device if there is one")
    why["dtype"] = ("machine" if device == "cpu" else "checkpoint", "auto: fp32 on a CPU, else the checkpoint's")
    why["kv_cache_dtype"] = ("default", "auto: as dtype")
    needed = cache.blocks * cache.block * token_bytes
    why["kv_cache_memory_bytes"] = ("machine", f"{human(needed)}: {cache.blocks} blocks of {cache.block} tokens")
    decided = {"kv_cache_dtype": cache_dtype, "num_kv_blocks": cache.blocks, "kv_cache_memory_bytes": needed}
    given = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    return ResolvedConfig(
        effective,
        model,
        SchedulerConfig(
            max_num_seqs=cache.seqs,
            max_num_batched_tokens=tokens,
            max_model_len=cache.length,
            policy=config.policy,
            order=config.order,
            prefill_mode=config.prefill_mode,
            record_timeline=config.record_timeline,
            itl_budget=config.itl_budget,
        ),
        KVConfig(
            config.kv_layout,
            config.reorder,
            cache.block,
            cache.blocks,
            cache_dtype,
            token_bytes,
            prefix,
            config.debug_poison,
        ),
        MemoryPlan(hardware.free_bytes, weights, step, needed),
        _explained(effective, decided, given, why),
    )


def _check_parallel(config: EngineConfig, model: ModelConfig, device: str) -> None:
    check_ranks(model, config.tensor_parallel_size)
    if config.num_ranks > 1 and device == "cuda" and config.prefill_mode == "overlap":
        raise ValueError(
            f"prefill_mode='overlap' with {config.num_ranks} ranks on GPUs: they cannot talk on two streams; "
            "'mixed' and 'separate' work"
        )


def _room(
    config: EngineConfig, model: ModelConfig, hardware: Hardware, device: str, dtype: str, weights: int, step: int
) -> int:
    """Bytes for the cache, beside weights and steps."""
    share = memory_share(config, device)
    limit = int(hardware.free_bytes * share)
    if weights + step < limit:
        return limit - weights - step
    width = DTYPE_BYTES[dtype]
    fits = ["a smaller max_num_batched_tokens or max_num_seqs"] if weights < limit <= weights + step else []
    limit -= step
    if config.quantization == "none":
        tables = min(weights, 2 * model.vocab_size * model.hidden_size * width)  # which are not quantised
        fits += ["dtype='bfloat16'"] if width > 2 and weights * 2 // width < limit else []
        fits += ["quantization='int8'"] if tables + (weights - tables) // width < limit else []
    fits += _more_ranks(config, model, device, lambda times: weights // times < limit)
    steps = f" and a step {human(step)}" if step else ""
    raise ValueError(
        f"the weights take {human(weights)}{steps} but only {human(hardware.free_bytes)} is free on {device}, of "
        f"which {share:.0%} may be taken: {human(weights - limit)} too much; "
        f"{' or '.join(fits) or 'only a smaller model'} would fit"
    )


def _more_ranks(config: EngineConfig, model: ModelConfig, device: str, fits: Callable[[int], bool]) -> list[str]:
    """The fewest tensor-parallel GPUs with which something fits that so many times as many hold; ranks on a CPU share
    its memory."""
    ranks = config.tensor_parallel_size
    times = (n // ranks for n in range(2 * ranks, model.num_kv_heads + 1, ranks) if divides(model, n))
    return [f"tensor_parallel_size={n * ranks}" for n in times if device == "cuda" and fits(n)][:1]


class _Cache(NamedTuple):
    """What depends on the cache's size: requests at once, the context, and its blocks of so many tokens each."""

    seqs: int
    length: int
    block: int
    blocks: int


def _size_cache(
    config: EngineConfig, model: ModelConfig, device: str, free: int, token_bytes: int, weights: int
) -> tuple[_Cache, Reasons]:
    """A cache that fits `free` bytes beside the weights, and the reasons of what was not given."""
    why: Reasons = {"max_model_len": ("checkpoint", "max_position_embeddings")}
    length = config.max_model_len or model.max_position_embeddings
    _check_length(config, model, length)
    budget = config.kv_cache_memory_bytes or min(free, CPU_KV_BYTES if device == "cpu" else free)
    if budget > free:
        raise ValueError(
            f"kv_cache_memory_bytes={budget} ({human(budget)}) does not fit: {human(free)} is left beside the weights"
        )
    seqs, block = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS, config.block_size
    if config.kv_layout == "slab":
        if config.max_num_seqs is None:
            seqs = max(1, min(seqs, budget // (length * token_bytes)))
            why["max_num_seqs"] = ("machine", f"slots of {length} tokens that fit {human(budget)}")
        block, blocks = length, seqs
        why["num_kv_blocks"] = ("machine", "max_num_seqs slots")
    else:
        enough = seqs * -(-length // block)
        blocks = config.num_kv_blocks or min(budget // (block * token_bytes), enough)
        room = f"for {seqs} requests of {length} tokens" if blocks == enough else f"in {human(budget)}"
        why["num_kv_blocks"] = ("machine", f"blocks of {human(block * token_bytes)} {room}")
        if blocks < 1:
            raise ValueError(f"the {human(budget)} for the KV cache hold no block: {human(block * token_bytes)} would")
        if config.max_model_len is None and blocks * block < length:
            length = blocks * block
            why["max_model_len"] = ("machine", f"cut to the {blocks} blocks that the cache has")
    limit = budget if config.num_kv_blocks is None else free
    if blocks * block * token_bytes > limit or (blocks * block < length and config.num_kv_blocks is None):
        raise ValueError(
            _does_not_fit(config, model, device, _Cache(seqs, length, block, blocks), token_bytes, limit, free, weights)
        )
    return _Cache(seqs, length, block, blocks), why


def _explained(
    effective: EngineConfig, decided: Mapping[str, Any], given: Collection[str], why: Reasons
) -> tuple[Setting, ...]:
    """Every setting with its origin, and with a reason unless it was given and has an effect."""
    values = {f.name: getattr(effective, f.name) for f in fields(effective)} | dict(decided)
    idle = {}
    if effective.kv_layout == "paged":
        idle["reorder"] = "no effect: of the slab only"
    if effective.prefill_mode == "overlap" and effective.device == "cpu":
        idle["prefill_mode"] = "as mixed: there is no GPU"
    settings = []
    for name, value in values.items():
        origin, reason = ("given", "") if name in given else why.get(name, ("default", ""))
        settings.append(Setting(name, value, origin, idle.get(name, reason)))
    return tuple(settings)


def _check_length(config: EngineConfig, model: ModelConfig, length: int) -> None:
    if length > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is longer than the model's {model.max_position_embeddings} positions"
        )


def _does_not_fit(
    config: EngineConfig,
    model: ModelConfig,
    device: str,
    cache: _Cache,
    token_bytes: int,
    limit: int,
    free: int,
    weights: int,
) -> str:
    """limit: bytes that the cache may have; free: that it could, beside the weights."""
    tokens = limit // token_bytes
    if config.num_kv_blocks is not None:
        size = human(config.num_kv_blocks * config.block_size * token_bytes)
        most = tokens // config.block_size
        fits = f"num_kv_blocks={most} would fit" if most else "not one block would fit"
        return f"num_kv_blocks={config.num_kv_blocks} takes {size}, {human(limit)} is free: {fits}"
    slab = config.kv_layout == "slab"
    seqs, length = cache.seqs, cache.length
    rows, block = (seqs, 1) if slab else (1, cache.block)
    wanted = rows * block * -(-length // block)
    short = tokens // rows // block * block  # whole blocks
    needed = wanted * token_bytes
    choices = [f"kv_cache_memory_bytes={needed}"] if limit < needed <= free else []
    choices += [f"max_num_seqs={tokens // length}"] if slab and tokens >= length else []
    choices += [f"max_model_len={short}"] if short else []
    if config.kv_cache_dtype == "auto" and needed // 2 <= limit:  # half of 16 bits, less of more
        choices.append("kv_cache_dtype='fp8'")
    beside = weights if limit == free else 0  # of which more ranks hold less each
    choices += _more_ranks(config, model, device, lambda n: needed // n <= limit + beside - beside // n)
    what = f"a slab of max_num_seqs={seqs} x max_model_len={length}" if slab else f"max_model_len={length}"
    size = f"{human(needed)}{'' if slab else ' of KV cache for one request'}"
    return (
        f"{what} takes {size}, {human(limit)} is available: {' or '.join(choices) or 'only a smaller model'} would fit"
    )
