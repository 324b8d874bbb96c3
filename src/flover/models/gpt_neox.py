"""GPT-NeoX and Pythia (Black et al. 2022): attention and MLP side by side on two norms, partial rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import LMHead, VocabEmbedding
from flover.layers.linear import QKVLinear, RowLinear
from flover.layers.norm import LayerNorm
from flover.layers.rotary import Rotary, RotaryTables, rope_parameters
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, per_head
from flover.models.gpt2 import GPT2MLP


class GPTNeoXAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, bias: bool) -> None:
        super().__init__()
        self.qkv_proj = QKVLinear(config.hidden_size, config.num_heads, config.num_heads, config.head_dim, bias)
        self.out_proj = RowLinear(config.hidden_size, config.hidden_size, bias)
        self.attn = Attention(layer, config.head_dim**-0.5)

    def forward(self, x: Tensor, rotary: RotaryTables, ctx: ForwardContext) -> Tensor:
        q, k, v = self.qkv_proj(x)
        out: Tensor = self.out_proj(self.attn(q, k, v, ctx, rotary))
        return out


class GPTNeoXBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps = float(config.hf.get("layer_norm_eps", 1e-5))
        self.input_norm = LayerNorm(config.hidden_size, eps)
        self.self_attn = GPTNeoXAttention(config, layer, bool(config.hf.get("attention_bias", True)))
        self.post_norm = LayerNorm(config.hidden_size, eps)
        self.mlp = GPT2MLP(config, config.positive("intermediate_size"), str(config.hf.get("hidden_act", "gelu")))
        self.parallel = bool(config.hf.get("use_parallel_residual", True))

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: RotaryTables, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta)
        attended = self.self_attn(normed, rotary, ctx)
        if self.parallel:
            return x, self.mlp(self.post_norm(x), add=attended)
        normed, x = self.post_norm.add(x, attended)
        return x, self.mlp(normed)


class GPTNeoXForCausalLM(CausalLM):
    PREFIX: ClassVar[str] = "gpt_neox."
    IGNORED: ClassVar[tuple[str, ...]] = (
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"gpt_neox\.rotary_emb\.inv_freq",
    )
    RENAMED: ClassVar[Mapping[str, str]] = {"embed_out.weight": "lm_head.weight"}
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "gpt_neox.embed_in.weight",
        "layers.{i}.input_norm.weight": "gpt_neox.layers.{i}.input_layernorm.weight",
        "layers.{i}.input_norm.bias": "gpt_neox.layers.{i}.input_layernorm.bias",
        "layers.{i}.self_attn.qkv_proj.weight": per_head("gpt_neox.layers.{i}.attention.query_key_value.weight"),
        "layers.{i}.self_attn.qkv_proj.bias": per_head("gpt_neox.layers.{i}.attention.query_key_value.bias"),
        "layers.{i}.self_attn.out_proj.weight": "gpt_neox.layers.{i}.attention.dense.weight",
        "layers.{i}.self_attn.out_proj.bias": "gpt_neox.layers.{i}.attention.dense.bias",
        "layers.{i}.post_norm.weight": "gpt_neox.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.post_norm.bias": "gpt_neox.layers.{i}.post_attention_layernorm.bias",
        "layers.{i}.mlp.up_proj.weight": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
        "layers.{i}.mlp.up_proj.bias": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias",
        "layers.{i}.mlp.down_proj.weight": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight",
        "layers.{i}.mlp.down_proj.bias": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias",
        "norm.weight": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "lm_head.weight": "lm_head.weight",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = VocabEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GPTNeoXBlock(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, float(config.hf.get("layer_norm_eps", 1e-5)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)
        params = rope_parameters(config.hf)
        share = float(params.get("partial_rotary_factor", config.hf.get("rotary_pct", 0.25)))
        self.rotary = Rotary(int(config.head_dim * share), params, config.max_position_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        rotary = self.rotary.tables(positions, ctx.prompt_lens, x.dtype)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, rotary, ctx)
        return self.norm.add(x, delta)[0]
