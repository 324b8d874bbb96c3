"""BLOOM (BigScience 2022): ALiBi instead of positions, and a norm right after the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.attention import Attention, ForwardContext, alibi_slopes
from flover.layers.embedding import LMHead, VocabEmbedding
from flover.layers.norm import LayerNorm
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, per_head
from flover.models.gpt2 import GPT2MLP, GPT2Attention


class BloomAttention(GPT2Attention):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attn = Attention(layer, config.head_dim**-0.5, alibi_slopes=alibi_slopes(config.num_heads))


class BloomBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps = float(config.hf.get("layer_norm_epsilon", 1e-5))
        self.input_norm = LayerNorm(config.hidden_size, eps)
        self.self_attn = BloomAttention(config, layer)
        self.post_norm = LayerNorm(config.hidden_size, eps)
        self.mlp = GPT2MLP(config, 4 * config.hidden_size, "gelu_new")
        self.normed_residual = bool(config.hf.get("apply_residual_connection_post_layernorm", False))

    def forward(self, x: Tensor, delta: Tensor | None, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta)
        normed, x = self.post_norm.add(normed if self.normed_residual else x, self.self_attn(normed, ctx))
        return normed if self.normed_residual else x, self.mlp(normed)


class BloomForCausalLM(CausalLM):
    PREFIX: ClassVar[str] = "transformer."
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "transformer.word_embeddings.weight",
        "embed_norm.weight": "transformer.word_embeddings_layernorm.weight",
        "embed_norm.bias": "transformer.word_embeddings_layernorm.bias",
        "layers.{i}.input_norm.weight": "transformer.h.{i}.input_layernorm.weight",
        "layers.{i}.input_norm.bias": "transformer.h.{i}.input_layernorm.bias",
        "layers.{i}.self_attn.qkv_proj.weight": per_head("transformer.h.{i}.self_attention.query_key_value.weight"),
        "layers.{i}.self_attn.qkv_proj.bias": per_head("transformer.h.{i}.self_attention.query_key_value.bias"),
        "layers.{i}.self_attn.out_proj.weight": "transformer.h.{i}.self_attention.dense.weight",
        "layers.{i}.self_attn.out_proj.bias": "transformer.h.{i}.self_attention.dense.bias",
        "layers.{i}.post_norm.weight": "transformer.h.{i}.post_attention_layernorm.weight",
        "layers.{i}.post_norm.bias": "transformer.h.{i}.post_attention_layernorm.bias",
        "layers.{i}.mlp.up_proj.weight": "transformer.h.{i}.mlp.dense_h_to_4h.weight",
        "layers.{i}.mlp.up_proj.bias": "transformer.h.{i}.mlp.dense_h_to_4h.bias",
        "layers.{i}.mlp.down_proj.weight": "transformer.h.{i}.mlp.dense_4h_to_h.weight",
        "layers.{i}.mlp.down_proj.bias": "transformer.h.{i}.mlp.dense_4h_to_h.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        eps = float(config.hf.get("layer_norm_epsilon", 1e-5))
        self.embed = VocabEmbedding(config.vocab_size, config.hidden_size)
        self.embed_norm = LayerNorm(config.hidden_size, eps)
        self.layers = nn.ModuleList(BloomBlock(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, eps)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed_norm(self.embed(input_ids))
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, ctx)
        return self.norm.add(x, delta)[0]
