"""Qwen 3 (Yang et al. 2025): LLaMA with RMSNorm on each head of q and k before the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flover.layers.norm import RMSNorm
from flover.model_config import ModelConfig
from flover.models.base import Source
from flover.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        eps = float(config.hf.get("rms_norm_eps", 1e-6))
        self.q_norm = RMSNorm(config.head_dim, eps)
        self.k_norm = RMSNorm(config.head_dim, eps)


class Qwen3Block(LlamaBlock):
    attention = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    block = Qwen3Block
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        **LlamaForCausalLM.WEIGHTS,
        "layers.{i}.self_attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.self_attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    }
