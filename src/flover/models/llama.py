"""LLaMA 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024): RMSNorm, rotary, grouped queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.activation import Activation
from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import LMHead, VocabEmbedding
from flover.layers.linear import ColumnLinear, QKVLinear, RowLinear
from flover.layers.norm import RMSNorm
from flover.layers.rotary import Rotary, RotaryTables, rope_parameters
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, join


class LlamaAttention(nn.Module):
    """Families set what differs after `super().__init__`: biases by argument, `attn`, norms of q and k."""

    def __init__(
        self, config: ModelConfig, layer: int, qkv_bias: bool | None = None, out_bias: bool | None = None
    ) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        bias = bool(config.hf.get("attention_bias", False))
        self.qkv_proj = QKVLinear(config.hidden_size, heads, kv_heads, size, bias if qkv_bias is None else qkv_bias)
        self.o_proj = RowLinear(heads * size, config.hidden_size, bias if out_bias is None else out_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn = Attention(layer, config.head_dim**-0.5, config.sliding_window(layer))

    def forward(self, x: Tensor, rotary: RotaryTables, ctx: ForwardContext) -> Tensor:
        q, k, v = self.qkv_proj(x)
        out: Tensor = self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, ctx, rotary))
        return out


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig, activation: str, bias: bool = False) -> None:
        super().__init__()
        size = config.positive("intermediate_size")
        self.gate_up_proj = ColumnLinear(config.hidden_size, [size, size], bias)
        self.down_proj = RowLinear(size, config.hidden_size, bias)
        self.act = Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj.gated(x, self.act, into=self.down_proj))
        return out


class LlamaBlock(nn.Module):
    attention: type[LlamaAttention] = LlamaAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps = float(config.hf.get("rms_norm_eps", 1e-6))
        self.input_norm = RMSNorm(config.hidden_size, eps)
        self.self_attn = self.attention(config, layer)
        self.post_norm = RMSNorm(config.hidden_size, eps)
        bias = bool(config.hf.get("mlp_bias", False))
        self.mlp = LlamaMLP(config, str(config.hf.get("hidden_act", "silu")), bias)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: RotaryTables, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The stream is x + delta: each norm adds what the part before it made, in one pass."""
        normed, x = self.input_norm.add(x, delta, into=self.self_attn.qkv_proj)
        normed, x = self.post_norm.add(x, self.self_attn(normed, rotary, ctx), into=self.mlp.gate_up_proj)
        return x, self.mlp(normed)


class LlamaForCausalLM(CausalLM):
    """Parameters as in `WEIGHTS`; families that differ only in a detail subclass it and say that detail."""

    PREFIX: ClassVar[str] = "model."
    IGNORED: ClassVar[tuple[str, ...]] = (r".*rotary_emb\.inv_freq",)
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "model.embed_tokens.weight",
        "layers.{i}.input_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.self_attn.qkv_proj.weight": join(*(f"model.layers.{{i}}.self_attn.{n}_proj.weight" for n in "qkv")),
        "layers.{i}.self_attn.qkv_proj.bias": join(*(f"model.layers.{{i}}.self_attn.{n}_proj.bias" for n in "qkv")),
        "layers.{i}.self_attn.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.self_attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
        "layers.{i}.post_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.mlp.gate_up_proj.weight": join(
            "model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"
        ),
        "layers.{i}.mlp.gate_up_proj.bias": join(
            "model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"
        ),
        "layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
        "layers.{i}.mlp.down_proj.bias": "model.layers.{i}.mlp.down_proj.bias",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    embedding: type[VocabEmbedding] = VocabEmbedding
    block: type[nn.Module] = LlamaBlock

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = self.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, float(config.hf.get("rms_norm_eps", 1e-6)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)
        params = rope_parameters(config.hf)
        if params.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor {params['partial_rotary_factor']} is not supported by this family")
        self.rotary = Rotary(config.head_dim, params, config.max_position_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        rotary = self.rotary.tables(positions, ctx.prompt_lens, x.dtype)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, rotary, ctx)
        return self.norm.add(x, delta)[0]
