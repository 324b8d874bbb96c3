"""The product of few rows: two kernels and their launches; linear.py and quantised.py decide when and how it is cut.

One program reads whole rows of the weight, `[out_features, in_features]`, tile after tile, and multiplies each with
all of x: the weight is the left operand of the matrix instruction and tokens are the narrow side, so nothing is padded
to 64 rows. With PDL the first tiles are fetched into L2 while the kernel before still runs: weights depend on no one,
and the memory does not idle between kernels. Narrow layers are split along the inner dimension too; partial sums lie in
a workspace and the last program to arrive adds them in order, so the result is deterministic. Weights of 8 bits become
x's type in registers, and sums are scaled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import arrivals, grid_launch, grid_wait, launch_options, prefetch
from flover.kernels.triton.fused import _activate, _gated

AHEAD = 2  # tiles
HALF = (torch.float16, torch.bfloat16)  # fp32 products are bound by arithmetic


class Tiling(NamedTuple):
    """How one product is cut; chosen from the shape alone."""

    block_n: int
    block_k: int
    split_k: int
    num_stages: int
    num_warps: int


@triton.jit
def _scales(scale, index, inside, USED: tl.constexpr):
    return tl.load(scale + index, mask=inside, other=0.0) if USED else tl.full(index.shape, 1.0, tl.float32)


@triton.jit
def _add_bias(sums, bias, n, inside, USED: tl.constexpr, FORK: tl.constexpr):
    """To sums of one dimension, or of features by tokens. FORK: features before the first that has one."""
    if USED:
        if FORK > 0:
            inside = inside & (n >= FORK)
        b = tl.load(bias + n - FORK, mask=inside, other=0.0).to(tl.float32)
        sums += b if len(sums.shape) == 1 else b[:, None]
    return sums


@triton.jit
def _finished(
    value, add, where, n, inside, DTYPE: tl.constexpr, ACT: tl.constexpr, FORK: tl.constexpr, ADD: tl.constexpr
):
    """The activation of a result, and the sum with `add`; rounded where the separate steps round."""
    value = value.to(DTYPE)
    if ACT != "":
        acted = _activate(value.to(tl.float32), ACT).to(DTYPE)
        value = acted if FORK == 0 else tl.where(n >= FORK, acted, value)
    if ADD:
        value += tl.load(add + where, mask=inside, other=0.0)
    return value


@triton.jit
def _one_row(
    x,  # [K]
    w,  # [N, K]
    bias,
    add,  # [N]
    scale,  # [N] fp32, of the weight
    x_scale,  # [1] fp32
    out,  # [N]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    ACT: tl.constexpr,
    FORK: tl.constexpr,
    ADD: tl.constexpr,
    SCALES: tl.constexpr,  # 1: weights have 8 bits and scales, 2: x too
    PDL: tl.constexpr,
):
    """One token: every product is its own, so no matrix instruction, and weights go straight to registers."""
    grid_launch(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if GATE != "":
        N = N // 2
    rows = w + n.to(tl.int64)[:, None] * K
    uppers = rows + N.to(tl.int64) * K
    inside = n[:, None] < N
    mask = inside & (k[None, :] < K)
    wt = tl.load(rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")  # weights wait for no one
    wu = wt
    if GATE != "":
        wu = tl.load(uppers + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    factor = _scales(scale, n, n < N, SCALES > 0)
    up_factor = _scales(scale + N, n, n < N, SCALES > 0 and GATE != "")
    grid_wait(PDL)
    token_scale = _scales(x_scale, tl.zeros([1], tl.int32), True, SCALES > 1)
    token = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    acc = wt.to(tl.float32) * token
    up = wu.to(tl.float32) * token
    for at in range(BLOCK_K, K, BLOCK_K):
        mask = inside & ((at + k)[None, :] < K)
        token = tl.load(x + at + k, mask=at + k < K, other=0.0).to(tl.float32)[None, :]
        wt = tl.load(rows + (at + k)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        acc += wt.to(tl.float32) * token
        if GATE != "":
            wu = tl.load(uppers + (at + k)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            up += wu.to(tl.float32) * token
    result = _add_bias(tl.sum(acc, 1) * token_scale * factor, bias, n, n < N, HAS_BIAS, FORK)
    result = _finished(result, add, n, n, n < N, out.dtype.element_ty, ACT, FORK, ADD)
    if GATE != "":
        other = _add_bias(tl.sum(up, 1) * token_scale * up_factor, bias + N, n, n < N, HAS_BIAS, 0)
        result = _gated(result, other, out.dtype.element_ty, GATE)
    tl.store(out + n, result, mask=n < N)


@triton.jit
def _ended(
    sums,
    bias,
    add,
    out,
    where,
    n,
    N,
    inside,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    FORK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Bias, and what `_finished` does, of features by tokens."""
    sums = _add_bias(sums, bias, n, n < N, HAS_BIAS, FORK)
    return _finished(sums, add, where, n[:, None], inside, out.dtype.element_ty, ACT, FORK, ADD)


@triton.jit(do_not_specialize=["M"])
def _linear(
    x,  # [M, K]
    w,  # [N, K]
    bias,
    add,  # [M, N]
    scale,  # [N] fp32, of the weight
    x_scale,  # [M] fp32
    out,  # [M, N]
    partial,  # [SPLIT_K, M, N] fp32
    arrived,  # [N / BLOCK_N * M / BLOCK_M] int32, zero before and after
    M,
    N,
    K,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,  # an activation's name: the weight is gate over up, and out is act(gate) * up, [M, N / 2]
    ACT: tl.constexpr,  # an activation's name: out is act(x @ w.T), from feature FORK on
    FORK: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,  # N and K / SPLIT_K are whole tiles
    SCALES: tl.constexpr,  # 1: weights have 8 bits and scales, 2: x too
    ACC: tl.constexpr,  # int32 sums int8 products, else fp32
    PARTIAL: tl.constexpr,  # fp8 products that the matrix unit may sum by itself, in less than fp32
    LINE: tl.constexpr,  # weights in 128 bytes
    AHEAD: tl.constexpr,  # tiles fetched into L2 before the wait
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATE != "":
        N = N // 2
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    start = pid_k * per_split
    end = tl.minimum(start + per_split, K)
    rows = w + n.to(tl.int64)[:, None] * K
    tokens = x + m.to(tl.int64)[None, :] * stride_x
    if PDL and AHEAD > 0:
        lines = start + tl.arange(0, AHEAD * BLOCK_K // LINE) * LINE
        prefetch(rows + lines[None, :])
        if GATE != "":
            prefetch(rows + N.to(tl.int64) * K + lines[None, :])
    factor = _scales(scale, n, n < N, SCALES > 0)[:, None]
    up_factor = _scales(scale + N, n, n < N, SCALES > 0 and GATE != "")[:, None]
    grid_wait(PDL)
    token_scale = _scales(x_scale, m, m < M, SCALES > 1)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    up = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for at in range(start, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if EVEN:
            wt = tl.load(rows + k[None, :], eviction_policy="evict_first")
            xt = tl.load(tokens + k[:, None], mask=m[None, :] < M, other=0.0)
        else:
            wt = tl.load(rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < end), other=0.0)
            xt = tl.load(tokens + k[:, None], mask=(m[None, :] < M) & (k[:, None] < end), other=0.0)
        acc = tl.dot(wt.to(xt.dtype), xt, acc, input_precision="ieee", max_num_imprecise_acc=PARTIAL, out_dtype=ACC)
        if GATE != "":
            wu = tl.load(rows + N.to(tl.int64) * K + k[None, :], eviction_policy="evict_first")
            up = tl.dot(wu.to(xt.dtype), xt, up, input_precision="ieee", max_num_imprecise_acc=PARTIAL, out_dtype=ACC)
    acc = acc.to(tl.float32)
    inside = (n[:, None] < N) & (m[None, :] < M)
    where = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT_K > 1:
        tl.store(partial + pid_k * M * N + where, acc, mask=inside)
        tl.debug_barrier()
        unit = pid_n * tl.num_programs(2) + tl.program_id(2)
        if tl.atomic_add(arrived + unit, 1, sem="acq_rel") == SPLIT_K - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(SPLIT_K):
                total += tl.load(partial + i * M * N + where, mask=inside, other=0.0, cache_modifier=".cg")
            total = _ended(total * token_scale * factor, bias, add, out, where, n, N, inside, HAS_BIAS, ACT, FORK, ADD)
            tl.store(out + where, total, mask=inside)
            tl.store(arrived + unit, 0)
    else:
        result = _ended(acc * token_scale * factor, bias, add, out, where, n, N, inside, HAS_BIAS, ACT, FORK, ADD)
        if GATE != "":
            up = _add_bias(up.to(tl.float32) * token_scale * up_factor, bias + N, n, True, HAS_BIAS, 0)
            result = _gated(result, up, out.dtype.element_ty, GATE)
        tl.store(out + where, result, mask=inside)


class Scales(NamedTuple):
    """Of a weight of 8 bits `[out]`; of tokens `[num_tokens]`, if x has 8 bits too; and what the result is then."""

    weight: Tensor
    tokens: Tensor | None
    dtype: torch.dtype


class End(NamedTuple):
    """What becomes of a product: act(gate) * up if the weight is gate over up, else act(product) + add.

    fork: features before the first that `act` is of, and the bias.
    """

    gate: str = ""
    act: str = ""
    fork: int = 0
    add: Tensor | None = None  # [num_tokens, out], contiguous


PLAIN = End()


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, end: End, scales: Scales | None) -> dict[str, Any]:
    """What both kernels take, by name."""
    N, K = weight.shape
    assert end.add is None or end.add.is_contiguous()
    dtype, kind = (x.dtype, 0) if scales is None else (scales.dtype, 1 if scales.tokens is None else 2)
    return {
        "x": x,
        "w": weight,
        "bias": x if bias is None else bias,
        "add": x if end.add is None else end.add,
        "scale": scales.weight if scales else x,
        "x_scale": scales.tokens if scales and kind == 2 else x,
        "out": torch.empty(len(x), N // 2 if end.gate else N, dtype=dtype, device=x.device),
        "N": N,
        "K": K,
        "HAS_BIAS": bias is not None,
        "GATE": end.gate,
        "ACT": end.act,
        "FORK": end.fork,
        "ADD": end.add is not None,
        "SCALES": kind,
        **launch_options(x.device),
    }


def _launch_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    end: End = PLAIN,
    scales: Scales | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """tile: rows of the weight, elements of each, warps."""
    block_n, block_k, warps = tile or (2, 1024 if len(weight) >= 4096 and not end.gate else 2048, 4)
    given = _arguments(x, weight, bias, end, scales)
    out: Tensor = given["out"]
    _one_row[(triton.cdiv(out.shape[1], block_n),)](**given, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps)
    return out


def block_m(rows: int) -> int:
    """Tokens of a tile that holds so many, if it can."""
    return max(16, min(1 << (rows - 1).bit_length(), 128))


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block_m: int,
    t: Tiling,
    end: End = PLAIN,
    scales: Scales | None = None,
) -> Tensor:
    given = _arguments(x, weight, bias, end, scales)
    out: Tensor = given["out"]
    (M, width), K = out.shape, weight.shape[1]
    partial = torch.empty(t.split_k * M * width, dtype=torch.float32, device=x.device) if t.split_k > 1 else out
    even = width % t.block_n == 0 and K % (t.block_k * t.split_k) == 0
    assert even or not end.gate
    line = 128 // weight.element_size()
    _linear[(triton.cdiv(width, t.block_n), t.split_k, triton.cdiv(M, block_m))](
        **given,
        partial=partial,
        arrived=arrivals(x.device),
        M=M,
        stride_x=x.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        SPLIT_K=t.split_k,
        EVEN=even,
        ACC=tl.int32 if x.dtype == torch.int8 else tl.float32,
        PARTIAL=min(128, t.block_k) if x.dtype == torch.float8_e4m3fn else None,
        LINE=line,
        AHEAD=AHEAD if even and line <= AHEAD * t.block_k <= K // t.split_k else 0,
        num_stages=t.num_stages,
        num_warps=t.num_warps,
    )
    return out


def _launch_invariant(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
    """One tiling whatever the number of tokens, which sums in the same order for every row."""
    depth = 32 if x.dtype == torch.float32 else 64
    return _launch(x, weight, bias, 64, Tiling(64, depth, 1, num_stages=3, num_warps=4), scales=scales)
