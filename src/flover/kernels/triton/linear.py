"""Linear layers: cuBLAS, except where it leaves bandwidth unused or a row's bits must not depend on other rows.

At few rows a product is a stream of its weight, `[out_features, in_features]`. One program reads whole rows of it, tile
after tile, and multiplies each with all of x: the weight is the left operand of the matrix instruction and tokens are
the narrow side, so nothing is padded to 64 rows. With PDL the first tiles are fetched into L2 while the kernel before
still runs: weights depend on no one, and the memory does not idle between kernels. Narrow layers are split along the
inner dimension too; partial sums lie in a workspace and the last program to arrive adds them in order, so the result is
deterministic. The choice was measured (docs/performance.md): cuBLAS streams wide weights as fast, narrow ones not.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import arrivals, grid_launch, grid_wait, launch_options
from flover.kernels.triton.fused import _activate, gated

MAX_ROWS = 64  # tokens in one tile; more than that are cuBLAS's
AHEAD = 2  # tiles
HALF = (torch.float16, torch.bfloat16)  # fp32 products are bound by arithmetic
MAX_FEATURES = 65536  # cuBLAS streams an output head as fast as there is memory


class Tiling(NamedTuple):
    """How one product is cut; chosen from the shape alone."""

    block_n: int
    block_k: int
    split_k: int
    num_stages: int
    num_warps: int


@triton.jit
def _one_row(
    x,  # [K]
    w,  # [N, K]
    bias,
    out,  # [N]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
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
    grid_wait(PDL)
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
    total = tl.sum(acc, 1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if GATE != "":
        other = tl.sum(up, 1)
        if HAS_BIAS:
            other += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        result = _activate(result.to(tl.float32), GATE).to(out.dtype.element_ty) * other.to(out.dtype.element_ty)
    tl.store(out + n, result, mask=n < N)


@triton.jit
def _linear(
    x,  # [M, K]
    w,  # [N, K]
    bias,
    out,  # [M, N]
    partial,  # [SPLIT_K, M, N] fp32
    arrived,  # [N / BLOCK_N] int32, zero before and after
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
    EVEN: tl.constexpr,  # N and K / SPLIT_K are whole tiles
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
        lines = start + tl.arange(0, AHEAD * BLOCK_K // 64) * 64  # of 128 bytes
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [rows + lines[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        if GATE != "":
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [rows + N.to(tl.int64) * K + lines[None, :]],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    grid_wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(start, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if EVEN:
            wt = tl.load(rows + k[None, :], eviction_policy="evict_first")
            xt = tl.load(tokens + k[:, None], mask=m[None, :] < M, other=0.0)
        else:
            wt = tl.load(rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < end), other=0.0)
            xt = tl.load(tokens + k[:, None], mask=(m[None, :] < M) & (k[:, None] < end), other=0.0)
        acc = tl.dot(wt, xt, acc, input_precision="ieee")
        if GATE != "":
            wu = tl.load(rows + N.to(tl.int64) * K + k[None, :], eviction_policy="evict_first")
            up = tl.dot(wu, xt, up, input_precision="ieee")
    inside = (n[:, None] < N) & (m[None, :] < M)
    where = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT_K > 1:
        tl.store(partial + pid_k * M * N + where, acc, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pid_n, 1, sem="acq_rel") == SPLIT_K - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(SPLIT_K):
                total += tl.load(partial + i * M * N + where, mask=inside, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)
            tl.store(arrived + pid_n, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        result = acc.to(out.dtype.element_ty)
        if GATE != "":  # rounded where the separate steps round
            if HAS_BIAS:
                up += tl.load(bias + N + n).to(tl.float32)[:, None]
            result = _activate(result.to(tl.float32), GATE).to(out.dtype.element_ty) * up.to(out.dtype.element_ty)
        tl.store(out + where, result, mask=inside)


def _launch_one(x: Tensor, weight: Tensor, bias: Tensor | None, gate: str = "") -> Tensor:
    N, K = weight.shape
    width = N // 2 if gate else N
    out = torch.empty(1, width, dtype=x.dtype, device=x.device)
    _one_row[(triton.cdiv(width, 2),)](
        x,
        weight,
        x if bias is None else bias,
        out,
        N,
        K,
        BLOCK_N=2,
        BLOCK_K=1024 if N >= 4096 and not gate else 2048,
        HAS_BIAS=bias is not None,
        GATE=gate,
        num_warps=4,
        **launch_options(x.device),
    )
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int, t: Tiling, gate: str = "") -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    width = N // 2 if gate else N
    out = torch.empty(M, width, dtype=x.dtype, device=x.device)
    partial = torch.empty(t.split_k * M * N, dtype=torch.float32, device=x.device) if t.split_k > 1 else out
    even = width % t.block_n == 0 and K % (t.block_k * t.split_k) == 0
    assert even or not gate
    _linear[(triton.cdiv(width, t.block_n), t.split_k, triton.cdiv(M, block_m))](
        x,
        weight,
        x if bias is None else bias,
        out,
        partial,
        arrivals(x.device),
        M,
        N,
        K,
        x.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        SPLIT_K=t.split_k,
        HAS_BIAS=bias is not None,
        GATE=gate,
        EVEN=even,
        AHEAD=AHEAD if even and AHEAD * t.block_k * t.split_k <= K else 0,
        num_stages=t.num_stages,
        num_warps=t.num_warps,
        **launch_options(x.device),
    )
    return out


@cache
def tiling(rows: int, out_features: int, in_features: int, num_sms: int) -> Tiling | None:
    """How to cut a product of few rows so that its programs just fill the GPU; None: leave it to cuBLAS.

    Measured on an H200 (docs/performance.md). Wide weights keep every multiprocessor busy as they are; narrow ones do
    once the inner dimension is split; for those in between, and for an output head, cuBLAS is as fast.
    """
    if rows > MAX_ROWS or out_features > MAX_FEATURES or in_features < 1024:
        return None
    tiles = out_features // 64
    block_n, block_k = 64, 128
    if 3 * tiles >= 4 * num_sms:
        split = 1
        if rows > 16:
            block_n, block_k = 128, 64
    elif 2 * tiles <= num_sms:
        split = 2 if 3 * tiles >= num_sms else 4
    else:
        return None
    if out_features % block_n or in_features % (block_k * split) or tiles * split < 0.7 * num_sms:
        return None
    return Tiling(block_n, block_k, split, 6 if rows <= 32 else 5, 8 if 16 < rows <= 32 and split > 1 else 4)


def _tiling_for(x: Tensor, weight: Tensor) -> Tiling | None:
    if x.dtype not in HALF:
        return None
    return tiling(x.shape[0], *weight.shape, torch.cuda.get_device_properties(x.device).multi_processor_count)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
    """`x @ weight.T + bias`; x `[num_tokens, in]`, weight `[out, in]`.

    batch_invariant: one tiling whatever the number of tokens, which sums in the same order for every row.
    """
    if batch_invariant:
        wide = x.dtype == torch.float32
        return _launch(x, weight, bias, 64, Tiling(64, 32 if wide else 64, 1, num_stages=3, num_warps=4))
    chosen = _tiling_for(x, weight)
    split = chosen is not None and chosen.split_k > 1
    if x.shape[0] == 1 and len(weight) <= MAX_FEATURES and x.dtype in HALF and not split:
        return _launch_one(x, weight, bias)
    if chosen is None:
        return F.linear(x, weight, bias)
    return _launch(x, weight, bias, max(16, triton.next_power_of_2(x.shape[0])), chosen)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, *, batch_invariant: bool = False) -> Tensor:
    """act(x @ gate.T) * (x @ up.T), weight = gate over up; few rows in one launch."""
    chosen = None if batch_invariant else _tiling_for(x, weight)
    if x.shape[0] == 1 and chosen is not None:
        return _launch_one(x, weight, bias, name)
    if chosen is None or chosen.split_k > 1 or weight.shape[0] % 128:
        return gated(linear(x, weight, bias, batch_invariant=batch_invariant), name)
    half = chosen._replace(block_n=chosen.block_n // 2)
    return _launch(x, weight, bias, max(16, triton.next_power_of_2(x.shape[0])), half, name)
