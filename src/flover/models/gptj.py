"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side on one norm, interleaved partial rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from flover.layers.activation import Activation
from flover.layers.attention import Attention, ForwardContext
from flover.layers.embedding import LMHead, VocabEmbedding
from flover.layers.linear import QKVUpLinear, RowLinear
from flover.layers.norm import LayerNorm
from flover.layers.rotary import Rotary, RotaryTables
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, join


class GPTJBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, heads, width = config.hidden_size, config.num_heads, config.positive("n_inner", 4 * config.hidden_size)
        self.input_norm = LayerNorm(hidden, float(config.hf.get("layer_norm_epsilon", 1e-5)))
        self.in_proj = QKVUpLinear(hidden, heads, heads, config.head_dim, width)
        self.act = Activation(str(config.hf.get("activation_function", "gelu_new")))
        self.attn = Attention(layer, config.head_dim**-0.5)
        self.out_proj = RowLinear(hidden, hidden)
        self.down_proj = RowLinear(width, hidden, bias=True)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: RotaryTables, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta, into=self.in_proj)
        q, k, v, up = self.in_proj(normed, self.act)
        return x, self.down_proj(up, add=self.out_proj(self.attn(q, k, v, ctx, rotary)))


class GPTJForCausalLM(CausalLM):
    PREFIX: ClassVar[str] = "transformer."
    IGNORED: ClassVar[tuple[str, ...]] = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)
    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {
        "embed.weight": "transformer.wte.weight",
        "layers.{i}.input_norm.weight": "transformer.h.{i}.ln_1.weight",
        "layers.{i}.input_norm.bias": "transformer.h.{i}.ln_1.bias",
        "layers.{i}.in_proj.weight": join(
            *(f"transformer.h.{{i}}.attn.{n}_proj.weight" for n in "qkv"), "transformer.h.{i}.mlp.fc_in.weight"
        ),
        "layers.{i}.in_proj.bias": "transformer.h.{i}.mlp.fc_in.bias",
        "layers.{i}.out_proj.weight": "transformer.h.{i}.attn.out_proj.weight",
        "layers.{i}.down_proj.weight": "transformer.h.{i}.mlp.fc_out.weight",
        "layers.{i}.down_proj.bias": "transformer.h.{i}.mlp.fc_out.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rotary_dim = config.positive("rotary_dim", 64)
        if rotary_dim > config.head_dim:
            raise ValueError(f"rotary_dim {rotary_dim} is larger than the head dimension {config.head_dim}")
        self.embed = VocabEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GPTJBlock(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, float(config.hf.get("layer_norm_epsilon", 1e-5)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=True)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed)
        params = {"rope_theta": 10000.0, "rope_type": "default"}
        self.rotary = Rotary(rotary_dim, params, config.max_position_embeddings, interleaved=True)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        rotary = self.rotary.tables(positions, ctx.prompt_lens, x.dtype)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, rotary, ctx)
        return self.norm.add(x, delta)[0]
