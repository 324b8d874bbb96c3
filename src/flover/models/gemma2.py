"""Gemma 2 (Gemma Team 2024): norms before and after each part, soft caps, windows on every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import VocabEmbedding
from flover.layers.norm import RMSNorm
from flover.layers.rotary import RotaryTables
from flover.model_config import ModelConfig
from flover.models.base import Source
from flover.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP


def gemma_norm(config: ModelConfig, dim: int | None = None) -> RMSNorm:
    return RMSNorm(dim or config.hidden_size, float(config.hf.get("rms_norm_eps", 1e-6)), unit_offset=True)


class ScaledEmbedding(VocabEmbedding):
    """Embeddings times sqrt(dim), the factor rounded to the model's dtype as in the reference."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype, device="cpu").item()


class Gemma2Attention(LlamaAttention):
    softcap: float | None = 50.0  # unless the config says otherwise

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        scale = float(config.hf.get("query_pre_attn_scalar", 256)) ** -0.5
        softcap = config.hf.get("attn_logit_softcapping", self.softcap)
        self.attn = Attention(layer, scale, config.sliding_window(layer), softcap)


class Gemma2Block(nn.Module):
    attention: type[LlamaAttention] = Gemma2Attention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = gemma_norm(config)
        self.self_attn = self.attention(config, layer)
        self.post_attention_norm = gemma_norm(config)
        self.pre_mlp_norm = gemma_norm(config)
        self.mlp = LlamaMLP(config, str(config.hf.get("hidden_activation") or "gelu_pytorch_tanh"))
        self.post_mlp_norm = gemma_norm(config)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: RotaryTables, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta)
        normed, x = self.pre_mlp_norm.add(x, self.post_attention_norm(self.self_attn(normed, rotary, ctx)))
        return x, self.post_mlp_norm(self.mlp(normed))


class Gemma2ForCausalLM(LlamaForCausalLM):
    embedding = ScaledEmbedding
    block = Gemma2Block
    softcap: float | None = 30.0  # unless the config says otherwise
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        **{name: source for name, source in LlamaForCausalLM.WEIGHTS.items() if "post_norm" not in name},
        "layers.{i}.post_attention_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.pre_mlp_norm.weight": "model.layers.{i}.pre_feedforward_layernorm.weight",
        "layers.{i}.post_mlp_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        if config.hf.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention is not supported: generation is causal")
        super().__init__(config)
        self.norm = gemma_norm(config)
        self.softcap = config.hf.get("final_logit_softcapping", self.softcap)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
