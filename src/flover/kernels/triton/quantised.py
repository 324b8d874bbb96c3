"""Linear layers with weights of 8 bits; kernels/reference/quantised.py says what they compute.

Few rows stream the weight at half the bytes of bf16: it becomes the tokens' type in registers and the scale multiplies
the sum (product.py). Many rows are bound by arithmetic: the weight is written out in the tokens' type, scale included,
and the rest is cuBLAS; with tokens of 8 bits too it is the library's 8-bit product. Nothing waits for the device, so
all of it can be captured.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.reference.quantised import LARGEST, Tokens
from flover.kernels.triton.common import grid_launch, grid_wait, launch_options
from flover.kernels.triton.fused import _store_row, gated
from flover.kernels.triton.product import HALF, End, Scales, Tiling, _launch, _launch_invariant, _launch_one, block_m

MAX_ROWS = 256  # beyond, a weight is worth writing out
MAX_ROWS_8_BIT = 64  # beyond, tokens of 8 bits are the library's, which wants more than 16
SLICE = 2048  # rows whose int32 sums exist at a time


@triton.jit
def _quantise(
    x,  # [M, K]
    out,  # [M, K] int8 or fp8
    scale,  # [M] fp32
    K,
    stride_x,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride_x + k, mask=k < K, other=0.0)
    _store_row(out, scale, value, row, k, k < K, K, value.dtype, LARGEST)


def quantise_tokens(x: Tensor, dtype: torch.dtype) -> Tokens:
    """x `[n, k]` in 8 bits, with an fp32 scale for each row."""
    M, K = x.shape
    out = torch.empty(M, K, dtype=dtype, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(K)
    if M:
        _quantise[(M,)](
            x,
            out,
            scale,
            K,
            x.stride(0),
            LARGEST=LARGEST[dtype],
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(x.device),
        )
    return Tokens(out, scale, x.dtype)


@triton.jit
def _rescale(
    x,  # [M, N] of 8 bits, or int32
    x_scale,  # [M]
    scale,  # [N]
    bias,
    out,  # [M, N]
    N,
    BY_COLUMN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * N + n, mask=n < N, other=0.0).to(tl.float32) * tl.load(x_scale + row)
    if BY_COLUMN:
        value = value * tl.load(scale + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, value.to(out.dtype.element_ty), mask=n < N)


def _scale(x: Tensor, by_row: Tensor, by_column: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x * by_row (* by_column) (+ bias), rounded once; x `[M, N]` contiguous."""
    M, N = x.shape
    block = min(triton.next_power_of_2(N), 4096)
    _rescale[(M, triton.cdiv(N, block))](
        x,
        by_row,
        by_row if by_column is None else by_column,
        by_row if bias is None else bias,
        out,
        N,
        BY_COLUMN=by_column is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=max(block // 512, 1),
        **launch_options(x.device),
    )
    return out


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight `[out, in]` times the scale of its row, in dtype."""
    return _scale(weight, scale, None, None, torch.empty(weight.shape, dtype=dtype, device=weight.device))


@cache
def tiling(rows: int, out_features: int, in_features: int, num_sms: int) -> Tiling:
    """How to cut a product of few rows with an 8-bit weight so that its programs just fill the GPU.

    The bytes of a tile are those of a bf16 one (linear.py), so it is twice as deep; where that takes too many registers
    (gate and up at 17 to 32 rows), or x is most of what a tile reads, twice as wide.
    """
    wide = out_features >= 128 * 0.7 * num_sms
    block_n, block_k = (64, 256) if rows <= 16 or (rows <= 32 and not wide) else (128, 128)
    tiles = -(-out_features // block_n)
    split = next((s for s in (1, 2, 4) if tiles * s >= 0.7 * num_sms and in_features % (s * block_k) == 0), 1)
    while in_features % (block_k * split) and block_k > 64:
        block_k //= 2
    stages = {16: 6, 32: 5, 64: 5}.get(block_m(rows), 4)
    return Tiling(block_n, block_k, split, stages, 8 if block_n == 128 else 4)


def one_row_tile(out_features: int) -> tuple[int, int, int]:
    """Weight rows, elements of each, and warps of a program that has one token."""
    return (2, 2048 if out_features >= 4096 else 4096, 4)


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales) -> Tensor | None:
    """The 8-bit product of cuBLAS or CUTLASS, for what it takes."""
    (M, K), N = x.shape, weight.shape[0]
    assert scales.tokens is not None
    if M <= MAX_ROWS_8_BIT or K % 16 or N % 16:
        return None
    if x.dtype == torch.int8:
        out = torch.empty(M, N, dtype=scales.dtype, device=x.device)
        for i in range(0, M, SLICE):
            part = slice(min(i, M - 17), i + SLICE)  # a short rest takes rows again
            sums = torch._int_mm(x[part], weight.t())
            _scale(sums, scales.tokens[part], scales.weight, bias, out[part])
        return out
    if scales.dtype != torch.bfloat16 or x.device.type != "cuda":
        return None
    by_row, by_column = scales.tokens[:, None], scales.weight[None, :]
    out = torch._scaled_mm(x, weight.t(), by_row, by_column, out_dtype=torch.bfloat16)
    return out if bias is None else out + bias


def _few(x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, scales: Scales) -> Tensor:
    """The kernels of product.py; gate and activation in the same launch where its tiles allow."""
    (M, K), N = x.shape, weight.shape[0]
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    t = tiling(M, N, K, num_sms)
    if M == 1 and t.split_k == 1:
        return _launch_one(x, weight, bias, End(gate), scales, one_row_tile(N))
    half = t._replace(block_n=t.block_n // 2)
    if gate and t.split_k == 1 and N % t.block_n == 0 and K % t.block_k == 0:
        return _launch(x, weight, bias, block_m(M), half, End(gate), scales)
    out = _launch(x, weight, bias, block_m(M), t, scales=scales)
    return gated(out, gate) if gate else out


def _product(
    x: Tensor | Tokens,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: str,
    quantise_x: bool,
    quantise: torch.dtype | None,
    batch_invariant: bool,
) -> Tensor | Tokens:
    if quantise_x and isinstance(x, Tensor):
        x = quantise_tokens(x, weight.dtype)
    tokens, token_scale = (x, None) if isinstance(x, Tensor) else x[:2]
    scales = Scales(scale, token_scale, x.dtype)
    if batch_invariant:
        out: Tensor | None = _launch_invariant(tokens, weight, bias, scales)
    elif token_scale is not None:
        out = _library(tokens, weight, bias, scales)
    elif x.dtype not in HALF or len(tokens) > MAX_ROWS:
        out = F.linear(tokens, dequantise(weight, scale, x.dtype), bias)
    else:
        out = None
    if out is None:
        return _few(tokens, weight, bias, gate, scales)
    return gated(out, gate, quantise=quantise) if gate else out


def quantised_linear(
    x: Tensor | Tokens,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    quantise_x: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ (weight * scale).T + bias`; x `[num_tokens, in]`, weight `[out, in]` of 8 bits, scale `[out]` fp32.

    quantise_x: tokens become the weight's type first, with a scale each, unless x is such `Tokens` already.
    batch_invariant: one tiling whatever the number of tokens, which sums in the same order for every row.
    """
    out = _product(x, weight, scale, bias, "", quantise_x, None, batch_invariant)
    assert isinstance(out, Tensor)
    return out


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
) -> Tensor | Tokens:
    """act(x @ gate.T) * (x @ up.T), weight = gate over up; few rows in one launch.

    quantise: the result may become this type of 8 bits: where a kernel makes it anyway.
    """
    return _product(x, weight, scale, bias, name, quantise_x, quantise, batch_invariant)
