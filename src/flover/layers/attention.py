"""Attention as a layer, and the one explicit context that a forward pass gets: `ForwardContext`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flover.kernels.reference.attention import gather_history
from flover.layers.base import Layer
from flover.layers.rotary import RotaryTables
from flover.parallel import Group
from flover.sharding import Part, split


@dataclass(slots=True)
class ForwardContext:
    """Everything a forward pass needs beside the tokens; nothing is ambient.

    k_cache, v_cache: per layer `[num_blocks * block_size, kv_heads, head_dim]`.
    slot_mapping: `[num_tokens]` flat cache index of each new token.
    prompt_lens: `[num_tokens]` prompt length of each token's request (dynamic rope scaling reads it).
    meta: where queries and histories lie, in the form that the backend's attention takes.
    """

    k_cache: list[Tensor]
    v_cache: list[Tensor]
    slot_mapping: Tensor
    prompt_lens: Tensor
    meta: Any
    batch_invariant: bool = False

    def history(self, layer: int, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of a whole row in `dtype`, `[seq_len, kv_heads, head_dim]`, through the layout's own addressing."""
        return (
            gather_history(self.k_cache[layer], self.meta, row, dtype),
            gather_history(self.v_cache[layer], self.meta, row, dtype),
        )


class Attention(Layer):
    """Rotates q and k, stores this step's K/V, then attends over each row's history.

    Args:
        layer: index of the layer's cache.
        scale: multiplies q·k.
        window: sliding window in tokens, None for full attention.
        softcap: tanh cap on the scores (Gemma 2).
        alibi_slopes: `[num_heads]` (BLOOM).
    """

    def __init__(
        self,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.scale, self.window, self.softcap = layer, scale, window, softcap
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def shard(self, group: Group) -> Mapping[str, Part]:
        if self.alibi_slopes is not None:
            begin, end = split(len(self.alibi_slopes), group.rank, group.size)
            self.alibi_slopes = self.alibi_slopes[begin:end]
        return super().shard(group)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, rotary: RotaryTables | None = None
    ) -> Tensor:
        """q `[num_tokens, num_heads, head_dim]`, k and v with kv_heads -> `[num_tokens, num_heads * head_dim]`."""
        k_cache, v_cache = ctx.k_cache[self.layer], ctx.v_cache[self.layer]
        out: Tensor = self.ops.attention(
            q,
            k,
            v,
            k_cache,
            v_cache,
            ctx.slot_mapping,
            ctx.meta,
            rotary=rotary,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            alibi=self.alibi_slopes,
            batch_invariant=ctx.batch_invariant,
        )
        return out.flatten(1)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of ALiBi (Press et al. 2022, section 3), any number of heads, in BLOOM's own fp32 arithmetic."""
    power = 2 ** (num_heads.bit_length() - 1)  # the largest power of two within num_heads

    def geometric(ratio: float, exponents: range) -> Tensor:
        base = torch.tensor(ratio, dtype=torch.float32, device="cpu")
        return torch.pow(base, torch.tensor(exponents, dtype=torch.int32, device="cpu"))

    slopes = geometric(2 ** (-8 / power), range(1, power + 1))
    if power == num_heads:
        return slopes
    return torch.cat((slopes, geometric(2 ** (-4 / power), range(1, 2 * (num_heads - power), 2))))
