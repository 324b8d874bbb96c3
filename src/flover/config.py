"""Configuration: `ModelConfig` from a checkpoint's config.json, `EngineConfig` from the user, and one `resolve`.

Everything here is frozen. `resolve` turns what the user gave and what the machine has into the effective settings once,
and records where each value came from (`flover ... --explain`). No torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

# model types with sliding windows: every n-th layer has none (0: all have one), unless config.json has layer_types
WINDOWED = {"mistral": 0, "qwen2": 0, "qwen3": 0, "gemma2": 2, "gemma3_text": 6}
QUANTISED = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model, in one vocabulary for all families; `hf` is the whole config.json."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]
    hf: Mapping[str, Any] = field(repr=False)

    def sliding_window(self, layer: int) -> int | None:
        """Tokens layer `layer` looks back on, None for all (Mistral, Qwen, Gemma conventions)."""
        family = str(self.hf.get("model_type"))
        if family not in WINDOWED:
            return None
        window = self.hf.get("sliding_window", 4096)
        qwen = family.startswith("qwen")
        if not window or not self.hf.get("use_sliding_window", not qwen):
            return None
        kinds = self.hf.get("layer_types")
        if kinds is not None:
            sliding = kinds[layer] == "sliding_attention"
        elif qwen:
            sliding = layer >= int(self.hf.get("max_window_layers", 28))
        else:  # every n-th layer sees everything
            every = int(self.hf.get("sliding_window_pattern", WINDOWED[family]))
            sliding = every == 0 or (layer + 1) % every != 0
        return int(window) if sliding else None

    def positive(self, name: str, default: int | None = None) -> int:
        """A family's own size from config.json; ValueError if it is missing (and has no default) or not positive."""
        return _positive(self.hf, (name,), default)

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_dict(cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a Hugging Face config; `generation` (generation_config.json) wins on EOS.

        Raises:
            ValueError: a missing or impossible value, naming it; remote code; a pre-quantised checkpoint.
        """
        if hf.get("auto_map"):
            raise ValueError("config.json has auto_map: this checkpoint needs code of its own, which is never run")
        for name in QUANTISED:
            if hf.get(name):
                method = hf[name].get("quant_method", "unknown") if isinstance(hf[name], Mapping) else hf[name]
                raise ValueError(f"config.json has {name} ({method}): pre-quantised checkpoints are not supported")
        architectures = hf.get("architectures") or []
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise ValueError(f"config.json must name one architecture, got {architectures!r}")

        def need(*names: str, default: int | None = None) -> int:
            return _positive(hf, names, default)

        hidden = need("hidden_size", "n_embd", "n_embed", "d_model")
        heads = need("num_attention_heads", "n_head", "num_heads")
        eos = dict(generation or {}).get("eos_token_id", hf.get("eos_token_id"))
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
        if hf.get("head_dim") is None and hidden % heads:
            raise ValueError(f"config.json: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        kv_heads = need("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
            )
        return cls(
            architecture=str(architectures[0]),
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            num_layers=need("num_hidden_layers", "n_layer", "num_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=need("head_dim", default=hidden // heads),
            max_position_embeddings=need("max_position_embeddings", "n_positions", "seq_length", default=2048),
            tie_word_embeddings=bool(
                hf.get("tie_word_embeddings", TIED_BY_DEFAULT.get(str(hf.get("model_type")), False))
            ),
            dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_token_ids=tuple(ids),
            hf=dict(hf),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """config.json (and generation_config.json, if any) of a checkpoint folder."""
        return cls.from_dict(read_json(folder / "config.json"), generation_defaults(folder))


def _positive(hf: Mapping[str, Any], names: tuple[str, ...], default: int | None) -> int:
    for name in names:
        value = hf.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
            return value
    if default is None:
        raise ValueError(f"config.json lacks {names[0]}")
    return default


# transformers' own default of tie_word_embeddings, for config.json files that leave it out
TIED_BY_DEFAULT = {"gpt2": True, "opt": True, "bloom": True, "gemma": True, "gemma2": True, "gemma3_text": True}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError with the file's name if it is missing or malformed."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def generation_defaults(folder: Path) -> dict[str, Any]:
    """generation_config.json, or nothing."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FP8 = "float8_e4m3fn"  # of a KV cache only: one byte, +-448, no infinity
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", *DTYPE_BYTES),
    "kv_cache_dtype": ("auto", "fp8"),
    "kv_layout": ("paged", "slab"),
    "reorder": ("off", "move", "indirect"),
    "policy": ("fused", "serial", "static"),
    "order": ("fcfs", "priority", "shortest"),
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
        num_kv_blocks: paged cache size in blocks of block_size; kv_cache_memory_bytes: in bytes. Give at most one.
        gpu_memory_utilization: share of the memory free on the GPU that weights, steps and cache may take together.
        batch_invariant: every logit bit-equal alone and fused, at the price of padding.
        seed: of requests that bring none.
        policy: "fused", or "serial" and "static" for comparison. order: who is admitted first.
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
    prefill_mode: str = "mixed"
    overlap_depth: int = 1
    device: str = "auto"
    generation_config: str = "auto"
    load_format: str = "auto"
    quantization: str = "none"
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
        if self.overlap_depth > 1:
            raise ValueError(f"overlap_depth must be 0 or 1, got {self.overlap_depth}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        if self.num_kv_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("give num_kv_blocks or kv_cache_memory_bytes, not both")
        if self.num_kv_blocks is not None and self.kv_layout == "slab":
            raise ValueError("num_kv_blocks is for kv_layout='paged'; a slab is sized by max_num_seqs x max_model_len")


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


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fused"
    order: str = "fcfs"
    prefill_mode: str = "mixed"
    record_timeline: bool = False


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


DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
CPU_KV_BYTES = 4 << 30  # reserved address range at most; pages are taken as they are written
CPU_MEMORY_SHARE = 0.9  # of what is free


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


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """K and V of one token in all layers, in a cache of `dtype`."""
    return model.kv_elements_per_token * (1 if dtype == FP8 else DTYPE_BYTES[dtype])


def resolve(
    config: EngineConfig, model: ModelConfig, hardware: Hardware, weights: int = 0, step: int = 0
) -> ResolvedConfig:
    """Decide every open setting, once.

    Args:
        weights: bytes that the weights will take on the device. step: that the largest step will, beside the cache.

    Raises:
        ValueError: a model or cache that cannot fit, saying by how much and what would.
    """
    given = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    why: dict[str, tuple[str, str]] = {}

    def decide(name: str, value: Any, origin: str, reason: str) -> Any:
        if name in given:
            return getattr(config, name)
        why[name] = (origin, reason)
        return value

    device = decide("device", hardware.device, "machine", "a CUDA device if there is one")
    dtype = effective_dtype(config, model, device)
    why["dtype"] = ("machine" if device == "cpu" else "checkpoint", "auto: fp32 on a CPU, else the checkpoint's")
    seqs = decide("max_num_seqs", DEFAULT_MAX_NUM_SEQS, "default", "")
    cache_dtype = kv_dtype(config, dtype)
    token_bytes = kv_bytes_per_token(model, cache_dtype)
    share = CPU_MEMORY_SHARE if device == "cpu" else config.gpu_memory_utilization
    free = int(hardware.free_bytes * share) - weights - step
    if free <= 0:
        steps = f" and a step {human(step)}" if step else ""
        smaller = "a smaller max_num_batched_tokens, max_num_seqs, dtype" if step else "a smaller dtype"
        raise ValueError(
            f"the weights take {human(weights)}{steps} but only {human(hardware.free_bytes)} is free on {device}, of "
            f"which {share:.0%} may be taken; {smaller}, quantization or a smaller model would fit"
        )
    length = config.max_model_len or model.max_position_embeddings
    _check_length(config, model, length)
    budget = config.kv_cache_memory_bytes or min(free, CPU_KV_BYTES if device == "cpu" else free)
    if budget > free:
        raise ValueError(
            f"kv_cache_memory_bytes={budget} ({human(budget)}) does not fit: {human(free)} is left beside the weights"
        )
    block, blocks = config.block_size, 0
    if config.kv_layout == "slab":
        if "max_num_seqs" not in given:
            seqs = max(1, min(seqs, budget // (length * token_bytes)))
            why["max_num_seqs"] = ("machine", f"slots of {length} tokens that fit {human(budget)}")
        block, blocks = length, seqs
    else:
        blocks = config.num_kv_blocks or min(budget // (block * token_bytes), seqs * -(-length // block))
        why["num_kv_blocks"] = ("machine", f"blocks of {human(block * token_bytes)} in {human(budget)}")
        if blocks < 1:
            raise ValueError(f"the {human(budget)} for the KV cache hold no block: {human(block * token_bytes)} would")
        if "max_model_len" not in given and blocks * block < length:
            length = blocks * block
            why["max_model_len"] = ("machine", f"cut to the {blocks} blocks that the cache has")
    needed = blocks * block * token_bytes
    limit = budget if config.kv_layout == "slab" or config.num_kv_blocks is None else free
    if needed > limit or (blocks * block < length and config.num_kv_blocks is None):
        raise ValueError(_does_not_fit(config, length, seqs, token_bytes, limit))
    if "max_model_len" not in given:
        why.setdefault("max_model_len", ("checkpoint", "max_position_embeddings"))
    tokens = decide("max_num_batched_tokens", DEFAULT_MAX_NUM_BATCHED_TOKENS, "default", "")
    prefix = config.enable_prefix_caching and config.kv_layout == "paged"
    effective = replace(
        config,
        device=device,
        dtype=dtype,
        max_num_seqs=seqs,
        max_model_len=length,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=prefix,
    )
    why["kv_cache_dtype"] = ("default", "auto: as dtype")
    why.setdefault("num_kv_blocks", ("machine", "max_num_seqs slots"))
    why["kv_cache_memory_bytes"] = ("machine", f"{human(needed)}: {blocks} blocks of {block} tokens")
    values = {f.name: getattr(effective, f.name) for f in fields(effective)}
    values |= {"kv_cache_dtype": cache_dtype, "num_kv_blocks": blocks, "kv_cache_memory_bytes": needed}
    if config.kv_layout == "paged":
        why["reorder"] = ("default", "no effect: of the slab only")
    if config.prefill_mode == "overlap" and device == "cpu":
        why["prefill_mode"] = ("given", "as mixed: there is no GPU")
    unknown = ("default", "")
    settings = tuple(
        Setting(name, value, "given" if name in given else why.get(name, unknown)[0], _reason(name, why, given))
        for name, value in values.items()
    )
    return ResolvedConfig(
        effective,
        model,
        SchedulerConfig(seqs, tokens, length, config.policy, config.order, config.prefill_mode, config.record_timeline),
        KVConfig(
            config.kv_layout, config.reorder, block, blocks, cache_dtype, token_bytes, prefix, config.debug_poison
        ),
        MemoryPlan(hardware.free_bytes, weights, step, needed),
        settings,
    )


def _reason(name: str, why: Mapping[str, tuple[str, str]], given: Collection[str]) -> str:
    """Why a setting is what it is; of a given one only if it has no effect."""
    reason = why.get(name, ("", ""))[1]
    return reason if name not in given or (reason.startswith(("no effect", "as ")) and name != "dtype") else ""


def _check_length(config: EngineConfig, model: ModelConfig, length: int) -> None:
    if length > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is longer than the model's {model.max_position_embeddings} positions"
        )


def _does_not_fit(config: EngineConfig, length: int, seqs: int, token_bytes: int, limit: int) -> str:
    tokens = limit // token_bytes
    if config.num_kv_blocks is not None:
        size = human(config.num_kv_blocks * config.block_size * token_bytes)
        fits = f"num_kv_blocks={tokens // config.block_size} would fit"
        return f"num_kv_blocks={config.num_kv_blocks} takes {size}, {human(limit)} is free: {fits}"
    if config.kv_layout == "slab":
        return (
            f"a slab of max_num_seqs={seqs} x max_model_len={length} takes {human(seqs * length * token_bytes)}, "
            f"{human(limit)} is free: max_num_seqs={tokens // length} or max_model_len={tokens // seqs} would fit"
        )
    return (
        f"max_model_len={length} takes {human(length * token_bytes)} of KV cache for one request, {human(limit)} is "
        f"available: max_model_len={tokens} would fit"
    )


def human(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
