"""GPT-2 (Radford et al. 2019): learned positions, layer norm before each part, GELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.activation import Activation
from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import Embedding, LMHead, VocabEmbedding
from flover.layers.linear import ColumnLinear, QKVLinear, RowLinear
from flover.layers.norm import LayerNorm
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, transposed


class GPT2Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.qkv_proj = QKVLinear(config.hidden_size, config.num_heads, config.num_heads, config.head_dim, bias=True)
        self.out_proj = RowLinear(config.hidden_size, config.hidden_size, bias=True)
        scale = config.head_dim**-0.5 if config.hf.get("scale_attn_weights", True) else 1.0
        if config.hf.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        self.attn = Attention(layer, scale)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = self.qkv_proj(x)
        out: Tensor = self.out_proj(self.attn(q, k, v, ctx))
        return out


class GPT2MLP(nn.Module):
    """Two layers around an activation; GPT-NeoX, BLOOM and OPT have the same one."""

    def __init__(self, config: ModelConfig, size: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = ColumnLinear(config.hidden_size, [size], bias)
        self.down_proj = RowLinear(size, config.hidden_size, bias)
        self.act = Activation(activation)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """add: what the layer has beside it."""
        out: Tensor = self.down_proj(self.up_proj(x, act=self.act), add=add)
        return out


class GPT2Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps = float(config.hf.get("layer_norm_epsilon", 1e-5))
        self.input_norm = LayerNorm(config.hidden_size, eps)
        self.self_attn = GPT2Attention(config, layer)
        self.post_norm = LayerNorm(config.hidden_size, eps)
        size = config.positive("n_inner", 4 * config.hidden_size)
        self.mlp = GPT2MLP(config, size, str(config.hf.get("activation_function", "gelu_new")))

    def forward(self, x: Tensor, delta: Tensor | None, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta)
        normed, x = self.post_norm.add(x, self.self_attn(normed, ctx))
        return x, self.mlp(normed)


class GPT2LMHeadModel(CausalLM):
    PREFIX: ClassVar[str] = "transformer."
    IGNORED: ClassVar[tuple[str, ...]] = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "transformer.wte.weight",
        "embed_positions.weight": "transformer.wpe.weight",
        "layers.{i}.input_norm.weight": "transformer.h.{i}.ln_1.weight",
        "layers.{i}.input_norm.bias": "transformer.h.{i}.ln_1.bias",
        "layers.{i}.self_attn.qkv_proj.weight": transposed("transformer.h.{i}.attn.c_attn.weight"),
        "layers.{i}.self_attn.qkv_proj.bias": "transformer.h.{i}.attn.c_attn.bias",
        "layers.{i}.self_attn.out_proj.weight": transposed("transformer.h.{i}.attn.c_proj.weight"),
        "layers.{i}.self_attn.out_proj.bias": "transformer.h.{i}.attn.c_proj.bias",
        "layers.{i}.post_norm.weight": "transformer.h.{i}.ln_2.weight",
        "layers.{i}.post_norm.bias": "transformer.h.{i}.ln_2.bias",
        "layers.{i}.mlp.up_proj.weight": transposed("transformer.h.{i}.mlp.c_fc.weight"),
        "layers.{i}.mlp.up_proj.bias": "transformer.h.{i}.mlp.c_fc.bias",
        "layers.{i}.mlp.down_proj.weight": transposed("transformer.h.{i}.mlp.c_proj.weight"),
        "layers.{i}.mlp.down_proj.bias": "transformer.h.{i}.mlp.c_proj.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.hf.get("add_cross_attention"):
            raise ValueError("add_cross_attention is not supported: there is no encoder to attend to")
        self.embed = VocabEmbedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(GPT2Block(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, float(config.hf.get("layer_norm_epsilon", 1e-5)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        delta: Tensor = self.embed_positions(positions)
        for layer in self.layers:
            x, delta = layer(x, delta, ctx)
        return self.norm.add(x, delta)[0]
