"""Pure-torch twins: the specification of every kernel, the CPU path, and fp64 on any device.

The names here are those that a layer may call; `kernels.triton` has the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flover.kernels.reference import attention as _plain
from flover.kernels.reference import invariant as _invariant
from flover.kernels.reference.fused import ACTIVATIONS, layer_norm, rms_norm, rotary_store, rotary_tables
from flover.kernels.reference.kv_cache import copy_blocks, poison_blocks
from flover.kernels.reference.quantised import Tokens, quantise_tokens, quantised_linear
from flover.kernels.reference.sampling import best_of_parts, draw, draw_part

__all__ = [
    "activation",
    "attention",
    "best_of_parts",
    "copy_blocks",
    "draw",
    "draw_part",
    "forked_linear",
    "gated",
    "gated_linear",
    "layer_norm",
    "linear",
    "poison_blocks",
    "quantised_gated_linear",
    "quantised_linear",
    "rms_norm",
    "rotary_tables",
]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: str = "",
    add: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`act(x @ weight.T + bias) + add`; x `[num_tokens, in]`, weight `[out, in]`."""
    out = _invariant.tiled_linear(x, weight, bias) if batch_invariant else F.linear(x, weight, bias)
    out = activation(out, act, batch_invariant=batch_invariant) if act else out
    return out if add is None else out + add


def forked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, fork: int, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Two layers that read the same tokens, the second with a bias and an activation, from features `fork` on."""
    first = linear(x, weight[:fork], None, batch_invariant=batch_invariant)
    return first, linear(x, weight[fork:], bias, act=act, batch_invariant=batch_invariant)


def activation(x: Tensor, name: str, *, batch_invariant: bool = False) -> Tensor:
    """An element-wise function by its config.json name."""
    function = ACTIVATIONS[name]
    return _invariant.tiled_map(function, x) if batch_invariant else function(x)


def gated(x: Tensor, name: str, *, batch_invariant: bool = False, quantise: torch.dtype | None = None) -> Any:
    """x `[num_tokens, 2n]`, gate and up side by side -> act(gate) * up.

    quantise: the result is `Tokens` of this type of 8 bits; None: a tensor in x's dtype.
    """
    gate, up = x.chunk(2, -1)
    out = activation(gate, name, batch_invariant=batch_invariant) * up
    return out if quantise is None else quantise_tokens(out, quantise)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, *, batch_invariant: bool = False) -> Tensor:
    """act(x @ gate.T) * (x @ up.T), weight = gate over up."""
    out = linear(x, weight, bias, batch_invariant=batch_invariant)
    product: Tensor = gated(out, name, batch_invariant=batch_invariant)
    return product


def quantised_gated_linear(
    x: Tensor | Tokens,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    name: str,
    *,
    quantise_x: bool = False,
    quantise: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Any:
    """`gated_linear` with a weight of 8 bits and its scale. quantise: of the result, as in `gated`."""
    out = quantised_linear(x, weight, scale, bias, quantise_x=quantise_x, batch_invariant=batch_invariant)
    return gated(out, name, batch_invariant=batch_invariant, quantise=quantise)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    meta: _plain.AttentionMetadata,
    *,
    rotary: tuple[Tensor, Tensor, bool] | None = None,
    batch_invariant: bool = False,
    **options: Any,
) -> Tensor:
    """Rotate q and k, store k and v at `slots` (below 0: not), attend over each row's history; -> the shape of q.

    q, k, v: `[num_tokens, heads, head_dim]`. rotary: cos, sin, and whether pairs are interleaved. options: as in
    `reference.attention.attention`, whose batch-invariant form is `reference.invariant`'s.
    """
    cos, sin, interleaved = rotary or (None, None, False)
    q = rotary_store(q, k, v, cos, sin, k_cache, v_cache, slots, interleaved=interleaved)
    attend = _invariant.invariant_attention if batch_invariant else _plain.attention
    return attend(q, k_cache, v_cache, meta, **options)
