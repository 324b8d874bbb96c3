"""Gemma 3, text only (Gemma Team 2025): Gemma 2 with q and k norms, and another rope base inside the windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from flover.layers.attention import ForwardContext
from flover.layers.rotary import Rotary, rope_parameters
from flover.model_config import ModelConfig
from flover.models.base import Source
from flover.models.gemma2 import Gemma2Attention, Gemma2Block, Gemma2ForCausalLM, gemma_norm


def rope_by_kind(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of full and of windowed layers: nested in transformers 5, two bases and one scaling in 4."""
    params = hf.get("rope_parameters") or {}
    full, local = params.get("full_attention"), params.get("sliding_attention")
    if full is None or local is None:
        full = {"rope_theta": hf.get("rope_theta", 1_000_000.0), **(hf.get("rope_scaling") or {})}
        local = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    return rope_parameters({"rope_parameters": full}), rope_parameters({"rope_parameters": local})


class Gemma3Attention(Gemma2Attention):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attn.softcap = None  # the reference has the setting and does not use it
        self.q_norm = gemma_norm(config, config.head_dim)
        self.k_norm = gemma_norm(config, config.head_dim)


class Gemma3Block(Gemma2Block):
    attention = Gemma3Attention


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    block = Gemma3Block
    softcap = None
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        **Gemma2ForCausalLM.WEIGHTS,
        "layers.{i}.self_attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.self_attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        full, local = rope_by_kind(config.hf)
        super().__init__(replace(config, hf={**config.hf, "rope_parameters": local}))
        self.windowed = [config.sliding_window(i) is not None for i in range(config.num_layers)]
        self.full_rotary = Rotary(config.head_dim, full, config.max_position_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        local = self.rotary.tables(positions, ctx.prompt_lens, x.dtype)
        full = self.full_rotary.tables(positions, ctx.prompt_lens, x.dtype)
        delta: Tensor | None = None
        for layer, windowed in zip(self.layers, self.windowed):
            x, delta = layer(x, delta, local if windowed else full, ctx)
        return self.norm.add(x, delta)[0]
