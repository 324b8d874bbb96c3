"""Row-wise steps of a layer, each in one launch: residual and norm, activation and gate; rotary.py has the third.

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
from flover.kernels.triton.common import grid_launch, grid_wait, launch_options
from flover.kernels.triton.exchange import Exchange, add_up


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
    memory=None,  # these six: residual is a part of a sum over the ranks (exchange.py)
    rounds=None,
    stop=None,
    capacity=0,
    RANK: tl.constexpr = 0,
    SIZE: tl.constexpr = 1,
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
        delta = tl.load(residual + row * stride_r + i, mask=inside, other=0.0)
        if SIZE > 1:
            delta = add_up(delta, row * dim + i, inside, memory, rounds, stop, capacity, RANK, SIZE)
        value = value + delta
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
    exchange: Exchange | None,
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
            **({} if exchange is None else exchange.arguments()),
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
    exchange: Exchange | None = None,
) -> tuple[Tensor | Tokens, Tensor]:
    """(x + residual) / rms * weight, and x + residual.

    unit_offset: the weight is stored minus one (Gemma). quantise: the normed tokens become this type of 8 bits.
    exchange: residual is this rank's part of a sum over the ranks, which is taken first; `exchange.fits` it.
    """
    return _normalise(x, weight, None, eps, residual, quantise, True, unit_offset, exchange)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    quantise: torch.dtype | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor | Tokens, Tensor]:
    """Layer norm of x + residual, and x + residual; the rest as in `rms_norm`."""
    return _normalise(x, weight, bias, eps, residual, quantise, False, False, exchange)


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
def _gated(gate, up, DTYPE: tl.constexpr, NAME: tl.constexpr):
    """act(gate) * up, rounded to DTYPE where the separate steps round."""
    return _activate(gate.to(DTYPE).to(tl.float32), NAME).to(DTYPE) * up.to(DTYPE)


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


def gated(x: Tensor, name: str, *, batch_invariant: bool = False, quantise: torch.dtype | None = None) -> Any:
    """x `[num_tokens, 2n]`, gate and up side by side -> act(gate) * up; always batch-invariant.

    quantise: the result is `Tokens` of this type of 8 bits; None: a tensor in x's dtype.
    """
    return _activation(x, name, True, quantise)
