"""Row-wise steps of a layer, each in one launch: residual and norm, activation and gate, rotation and KV store.

All of it is bound by memory: every input is read once, every output written once, arithmetic is fp32. Sums run over one
row in one program, so a token's bits do not depend on its batch. The twins are in kernels/reference/fused.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.reference.quantised import LARGEST, Tokens
from flover.kernels.triton.common import assert_heads_side_by_side, grid_launch, grid_wait, launch_options


@triton.jit
def _eight_bits(value, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """A row in units of 8 bits, fp32, and the unit."""
    largest = tl.max(tl.abs(value)) + tl.sum(value * 0.0)  # a maximum forgets NaN
    unit = tl.div_rn(tl.where(largest < 1e-30, 1e-30, largest), tl.full([], LARGEST, tl.float32))
    units = tl.div_rn(value, tl.zeros(value.shape, tl.float32) + unit)
    units = tl.minimum(tl.maximum(units, -LARGEST), LARGEST)
    if INTEGER:
        units = (units + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, ties to even
    return units, unit


@triton.jit
def _store_row(out, scale, value, row, at, inside, width, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """A row rounded to DTYPE; LARGEST > 0: and from there to 8 bits, with its scale."""
    value = value.to(DTYPE)
    if LARGEST > 0:
        units, unit = _eight_bits(value.to(tl.float32), LARGEST, out.dtype.element_ty == tl.int8)
        tl.store(out + row * width + at, units.to(out.dtype.element_ty), mask=inside)
        tl.store(scale + row, unit)
    else:
        tl.store(out + row * width + at, value, mask=inside)


@triton.jit
def _norm(
    x,
    residual,
    weight,
    bias,
    normed,
    scale,  # of normed tokens of 8 bits
    summed,
    stride_x,
    stride_r,
    dim,
    eps,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < dim
    w = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:  # parameters wait for no one
        w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        b = tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    grid_wait(PDL)
    value = tl.load(x + row * stride_x + i, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(residual + row * stride_r + i, mask=inside, other=0.0)
        tl.store(summed + row * dim + i, value, mask=inside)
    wide = value.to(tl.float32)
    if RMS:
        out = wide * tl.rsqrt(tl.sum(wide * wide) / dim + eps)
        if UNIT_OFFSET:
            out = out * (1.0 + w)
        else:
            out = out.to(x.dtype.element_ty).to(tl.float32) * w
    else:
        centred = tl.where(inside, wide - tl.sum(wide) / dim, 0.0)
        out = centred * tl.rsqrt(tl.sum(centred * centred) / dim + eps)
        if WEIGHT:
            out = out * w
        if BIAS:
            out = out + b
    _store_row(normed, scale, out, row, i, inside, dim, x.dtype.element_ty, LARGEST)


def _row_out(shape: torch.Size, x: Tensor, quantise: torch.dtype | None) -> tuple[Tensor, Tensor, float]:
    """Where `_store_row` writes: tokens in x's dtype or in 8 bits, their scales, and LARGEST."""
    out = torch.empty(shape, dtype=quantise or x.dtype, device=x.device)
    if quantise is None:
        return out, out, 0.0
    return out, torch.empty(shape[:-1], dtype=torch.float32, device=x.device), LARGEST[quantise]


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    quantise: torch.dtype | None,
    rms: bool,
    offset: bool,
) -> tuple[Tensor | Tokens, Tensor]:
    dim = x.shape[-1]
    if x.dim() != 2 and not x.is_contiguous():  # heads of a fused projection
        x = x.contiguous()
    normed, scale, largest = _row_out(x.shape, x, quantise)
    rows = x.numel() // dim
    if residual is not None:
        assert residual.is_contiguous() or residual.dim() == 2
    summed = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(dim)
    if rows:
        _norm[(rows,)](
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            x if bias is None else bias,
            normed,
            scale,
            summed,
            x.stride(0) if x.dim() == 2 else dim,  # a contiguous tensor may have any stride at a size of 1
            residual.stride(0) if residual is not None and residual.dim() == 2 else dim,
            dim,
            eps,
            RMS=rms,
            ADD=residual is not None,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            UNIT_OFFSET=offset,
            LARGEST=largest,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(x.device),
        )
    return normed if quantise is None else Tokens(normed, scale, x.dtype), summed


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
    return _normalise(x, weight, None, eps, residual, quantise, True, unit_offset)


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
    return _normalise(x, weight, bias, eps, residual, quantise, False, False)


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a maximum would turn NaN into 0
    if NAME == "silu" or NAME == "swish":
        return x * tl.sigmoid(x)
    if NAME == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # the tanh form: 1 + tanh(y) = 2 sigmoid(2y)


@triton.jit
def _gate(
    x,
    out,
    scale,  # of tokens of 8 bits; a program then has the whole row
    stride_x,
    width,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)  # the axis with room for more than 65535
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(x + row * stride_x + i, mask=inside, other=0.0)
    value = _activate(gate.to(tl.float32), NAME).to(gate.dtype)
    if GATED:
        value = value * tl.load(x + row * stride_x + width + i, mask=inside, other=0.0)
    _store_row(out, scale, value, row, i, inside, width, x.dtype.element_ty, LARGEST)


def _activation(x: Tensor, name: str, gated: bool, quantise: torch.dtype | None = None) -> Any:
    x = x if x.dim() == 2 else x.flatten(0, -2)
    rows, width = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out, scale, largest = _row_out(torch.Size((rows, width)), x, quantise)
    block = 512 if rows < 16 else 2048  # few rows: as many programs as there is room for
    if quantise is not None:
        block = triton.next_power_of_2(width)
    if rows:
        _gate[(rows, triton.cdiv(width, block))](
            x,
            out,
            scale,
            x.stride(0),
            width,
            NAME=name,
            GATED=gated,
            LARGEST=largest,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
            **launch_options(x.device),
        )
    return out if quantise is None else Tokens(out, scale, x.dtype)


def activation(x: Tensor, name: str, *, batch_invariant: bool = False) -> Tensor:
    """An element-wise function of x `[num_tokens, n]` by its config.json name; always batch-invariant."""
    out: Tensor = _activation(x, name, False)
    return out


def gated(
    x: Tensor, name: str, *, batch_invariant: bool = False, quantise: torch.dtype | None = None
) -> Tensor | Tokens:
    """x `[num_tokens, 2n]`, gate and up side by side -> act(gate) * up, in 8 bits if asked; always batch-invariant."""
    out: Tensor | Tokens = _activation(x, name, True, quantise)
    return out


@triton.jit(do_not_specialize_on_alignment=["positions", "cos", "sin"])  # views of one buffer each
def _tables(positions, inv_freq, cos, sin, PAIRS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    grid_launch(PDL)
    grid_wait(PDL)
    token = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + i, mask=i < PAIRS, other=0.0)
    tl.store(cos + token * PAIRS + i, tl.cos(angle).to(cos.dtype.element_ty), mask=i < PAIRS)
    tl.store(sin + token * PAIRS + i, tl.sin(angle).to(sin.dtype.element_ty), mask=i < PAIRS)


def rotary_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each `[num_tokens, 1, len(inv_freq)]`."""
    n, pairs = len(positions), len(inv_freq)
    cos, sin = torch.empty(2, n, 1, pairs, dtype=dtype, device=positions.device)
    if n:
        block = triton.next_power_of_2(pairs)
        _tables[(n,)](
            positions, inv_freq, cos, sin, PAIRS=pairs, BLOCK=block, num_warps=1, **launch_options(positions.device)
        )
    return cos, sin


@triton.jit
def _rotated(head, inside, d, cos, sin, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A head (or several: pointers `[heads, BLOCK_D]`) rotated; cos, sin: of its token."""
    x = tl.load(head, mask=inside, other=0.0)
    if INTERLEAVED:
        pair, partner = d // 2, tl.where(d % 2 == 0, 1, -1)
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        pair, partner = tl.where(d < PAIRS, d, d - PAIRS), tl.where(d < PAIRS, PAIRS, -PAIRS)
        sign = tl.where(d < PAIRS, -1.0, 1.0)
    turned = inside & (d < 2 * PAIRS)
    y = tl.load(head + partner, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=d < 2 * PAIRS, other=1.0).to(tl.float32)
    s = tl.load(sin + pair, mask=d < 2 * PAIRS, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * c + sign * y * s).to(x.dtype)


@triton.jit
def _to_cache(x, cache):
    """As a cache holds it: fp8 saturates, and keeps NaN."""
    if cache.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit(do_not_specialize_on_alignment=["cos", "sin", "slots"])
def _rotary_store(
    q,
    k,
    v,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    stride_q,
    stride_k,
    stride_v,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    HEADS: tl.constexpr,  # the same, a power of two
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a token and kv head, with its query heads."""
    grid_launch(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    grid_wait(PDL)
    slot = tl.load(slots + token)
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    key = k + token * stride_k + head * HEAD_DIM + d
    if PAIRS > 0:
        h = tl.arange(0, HEADS)
        queries = q + token * stride_q + (head * GROUP + h)[:, None] * HEAD_DIM + d[None, :]
        mine = (h < GROUP)[:, None] & inside[None, :]
        angles = token * PAIRS
        turned = _rotated(queries, mine, d[None, :], cos + angles, sin + angles, PAIRS, INTERLEAVED)
        key_out = _rotated(key, inside, d, cos + angles, sin + angles, PAIRS, INTERLEAVED)
        tl.debug_barrier()  # q is rotated in place: every partner has been read
        tl.store(queries, turned, mask=mine)
    else:
        key_out = tl.load(key, mask=inside, other=0.0)
    if slot >= 0:
        where = (slot * KV_HEADS + head) * HEAD_DIM + d
        tl.store(k_cache + where, _to_cache(key_out, k_cache), mask=inside)
        value = tl.load(v + token * stride_v + head * HEAD_DIM + d, mask=inside, other=0.0)
        tl.store(v_cache + where, _to_cache(value, v_cache), mask=inside)


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
    """Rotate q in place and k on its way into the cache, store v; -> q. Slots below 0 are not stored.

    q, k, v: `[num_tokens, heads, head_dim]`, views of one projection: heads side by side, any stride between tokens.
    """
    n, num_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert_heads_side_by_side(q, k, v)
    assert all(t.is_contiguous() for t in (k_cache, v_cache, slot_mapping))
    group, block_d = num_heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    heads = triton.next_power_of_2(group)
    if n:
        _rotary_store[(n, kv_heads)](
            q,
            k,
            v,
            q if cos is None else cos,
            q if sin is None else sin,
            k_cache,
            v_cache,
            slot_mapping,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAIRS=0 if cos is None else cos.shape[-1],
            INTERLEAVED=interleaved,
            BLOCK_D=block_d,
            num_warps=min(max(heads * block_d // 256, 1), 4),
            **launch_options(q.device),
        )
    return q
