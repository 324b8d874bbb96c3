"""Twins of the kernels that make one pass of several steps: residual and norm, activation and gate, rotation and store.

Half precision is normalised in fp32 and rounded where transformers rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flover.kernels.reference.kv_cache import store_kv
from flover.kernels.reference.quantised import Tokens, quantise_tokens

_tanh_gelu = partial(F.gelu, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    if not unit_offset and x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return normed.to(x.dtype) * weight


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: Tensor | None = None,
    quantise: torch.dtype | None = None,
) -> tuple[Tensor | Tokens, Tensor]:
    """(x + residual) / rms * weight, and x + residual.

    unit_offset: the weight is stored minus one (Gemma). quantise: the normed tokens become this type of 8 bits.
    """
    x = x if residual is None else x + residual
    normed = _rms_norm(x, weight, eps, unit_offset)
    return normed if quantise is None else quantise_tokens(normed, quantise), x


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    quantise: torch.dtype | None = None,
) -> tuple[Tensor | Tokens, Tensor]:
    """Layer norm of x + residual, and x + residual. quantise: the normed tokens become this type of 8 bits."""
    x = x if residual is None else x + residual
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed if quantise is None else quantise_tokens(normed, quantise), x


def rotary_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each `[num_tokens, 1, len(inv_freq)]`."""
    angles = (positions.float()[:, None] * inv_freq)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first dimensions, twice the width of the tables, of x `[num_tokens, heads, head_dim]`."""
    size = 2 * cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def rotary_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate q and k, store k and v at `slot_mapping`; -> q rotated. Without tables: store only."""
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    store_kv(k, v, k_cache, v_cache, slot_mapping)
    return q
