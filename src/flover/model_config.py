"""`ModelConfig`: what a checkpoint's config.json says of a model, in one vocabulary for all families. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
