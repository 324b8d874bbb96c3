"""Products with 8-bit weights: the specification of kernels/triton/quantised.py, and the CPU path.

A weight `[out, in]` is int8 or float8_e4m3fn with one fp32 scale per row; tokens, where they are quantised too, have
one each. Both types are exact in fp16 and bf16, so the only errors are the rounding to 8 bits, here, and one of the
result: a product is accumulated in fp32, scaled, biased and rounded once. (A kernel may round `weight * scale` to x's
dtype before a product of many rows.) fp64 tokens are computed in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flover.kernels.reference.invariant import tiled_linear

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 1e-30  # a row of zeros has some scale


def quantise_rows(x: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x `[n, k]` as int8 or float8_e4m3fn, and the scale of each row `[n]` (fp32; fp64 of fp64), x = q * scale.

    Symmetric: the largest magnitude of a row becomes 127 or 448. Rounds to nearest, ties to even. A row with a NaN or
    an infinity has a scale that is not finite, so that its product is not either. largest: the magnitude of each row
    `[n]`, where x is only a part of it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = (wide.abs().amax(-1) if largest is None else largest.to(wide.dtype)).clamp_min(SMALLEST)
    scale = largest / torch.full_like(largest, LARGEST[dtype])  # by a scalar, a GPU would multiply with its inverse
    units = (wide / scale[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (units.round() if dtype == torch.int8 else units).to(dtype), scale


class Tokens(NamedTuple):
    """x in 8 bits, `values * scale`: `[num_tokens, n]` and fp32 `[num_tokens]`; dtype: what x was in."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantise_tokens(x: Tensor, dtype: torch.dtype) -> Tokens:
    """x `[num_tokens, n]` in 8 bits, with a scale for each token."""
    return Tokens(*quantise_rows(x, dtype), x.dtype)


def quantised_linear(
    x: Tensor | Tokens,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    quantise_x: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ (weight * scale).T + bias`; x `[num_tokens, in]`, weight `[out, in]` of 8 bits, scale `[out]`.

    quantise_x: tokens become the weight's type first, with a scale each, unless x is such `Tokens` already.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if quantise_x and isinstance(x, Tensor):
        x = quantise_tokens(x, weight.dtype)
    tokens, token_scale = (x, None) if isinstance(x, Tensor) else x[:2]
    out = (tiled_linear if batch_invariant else F.linear)(tokens.to(wide), weight.to(wide), None)
    if token_scale is not None:
        out = out * token_scale[:, None]
    out = out * scale
    return (out if bias is None else out + bias).to(x.dtype)
