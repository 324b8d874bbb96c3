"""OPT (Zhang et al. 2022): learned positions from 2 on, norms before or after, projected embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import Embedding, LMHead, VocabEmbedding
from flover.layers.linear import Linear, QKVLinear, RowLinear
from flover.layers.norm import LayerNorm
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, join
from flover.models.gpt2 import GPT2MLP

POSITION_OFFSET = 2  # fairseq kept the first two positions for padding


def opt_norm(config: ModelConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, 1e-5, affine=bool(config.hf.get("layer_norm_elementwise_affine", True)))


class OPTBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.positive("ffn_dim")
        bias = bool(config.hf.get("enable_bias", True))
        self.norm_first = bool(config.hf.get("do_layer_norm_before", True))
        self.attn_norm = opt_norm(config)
        self.qkv_proj = QKVLinear(hidden, config.num_heads, config.num_heads, config.head_dim, bias)
        self.out_proj = RowLinear(hidden, hidden, bias)
        self.attn = Attention(layer, config.head_dim**-0.5)
        self.mlp_norm = opt_norm(config)
        self.mlp = GPT2MLP(config, size, str(config.hf.get("activation_function", "relu")), bias)

    def attend(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = self.qkv_proj(x)
        out: Tensor = self.out_proj(self.attn(q, k, v, ctx))
        return out

    def forward(self, x: Tensor, delta: Tensor | None, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        if self.norm_first:
            normed, x = self.attn_norm.add(x, delta)
            normed, x = self.mlp_norm.add(x, self.attend(normed, ctx))
            return x, self.mlp(normed)
        x, _ = self.attn_norm.add(x, self.attend(x, ctx))  # OPT-350m
        return self.mlp_norm.add(x, self.mlp(x))[0], None


class OPTForCausalLM(CausalLM):
    PREFIX: ClassVar[str] = "model."
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "model.decoder.embed_tokens.weight",
        "embed_positions.weight": "model.decoder.embed_positions.weight",
        "project_in.weight": "model.decoder.project_in.weight",
        "layers.{i}.attn_norm.weight": "model.decoder.layers.{i}.self_attn_layer_norm.weight",
        "layers.{i}.attn_norm.bias": "model.decoder.layers.{i}.self_attn_layer_norm.bias",
        "layers.{i}.qkv_proj.weight": join(*(f"model.decoder.layers.{{i}}.self_attn.{n}_proj.weight" for n in "qkv")),
        "layers.{i}.qkv_proj.bias": join(*(f"model.decoder.layers.{{i}}.self_attn.{n}_proj.bias" for n in "qkv")),
        "layers.{i}.out_proj.weight": "model.decoder.layers.{i}.self_attn.out_proj.weight",
        "layers.{i}.out_proj.bias": "model.decoder.layers.{i}.self_attn.out_proj.bias",
        "layers.{i}.mlp_norm.weight": "model.decoder.layers.{i}.final_layer_norm.weight",
        "layers.{i}.mlp_norm.bias": "model.decoder.layers.{i}.final_layer_norm.bias",
        "layers.{i}.mlp.up_proj.weight": "model.decoder.layers.{i}.fc1.weight",
        "layers.{i}.mlp.up_proj.bias": "model.decoder.layers.{i}.fc1.bias",
        "layers.{i}.mlp.down_proj.weight": "model.decoder.layers.{i}.fc2.weight",
        "layers.{i}.mlp.down_proj.bias": "model.decoder.layers.{i}.fc2.bias",
        "norm.weight": "model.decoder.final_layer_norm.weight",
        "norm.bias": "model.decoder.final_layer_norm.bias",
        "project_out.weight": "model.decoder.project_out.weight",
        "lm_head.weight": "lm_head.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.positive("word_embed_proj_dim", config.hidden_size)
        self.embed = VocabEmbedding(config.vocab_size, dim)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, hidden)
        self.project_in: nn.Module = Linear(dim, hidden) if dim != hidden else nn.Identity()
        self.layers = nn.ModuleList(OPTBlock(config, i) for i in range(config.num_layers))
        last = config.hf.get("do_layer_norm_before", True) and not config.hf.get("_remove_final_layer_norm", False)
        self.norm = opt_norm(config) if last else None
        self.project_out: nn.Module = Linear(hidden, dim) if dim != hidden else nn.Identity()
        self.lm_head = LMHead(dim, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.project_in(self.embed(input_ids)) + self.embed_positions(positions + POSITION_OFFSET)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, ctx)
        if self.norm is None:
            return x if delta is None else x + delta
        out: Tensor = self.norm.add(x, delta)[0]
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.project_out(hidden))
        return out
