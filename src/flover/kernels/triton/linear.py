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

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options

MAX_ROWS = 64  # tokens in one tile; more than that are cuBLAS's
AHEAD = 2  # tiles


class Tiling(NamedTuple):
    """How one product is cut; chosen from the shape alone."""

    block_n: int
    block_k: int
    split_k: int
    num_stages: int
    num_warps: int


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
    EVEN: tl.constexpr,  # N and K / SPLIT_K are whole tiles
    AHEAD: tl.constexpr,  # tiles fetched into L2 before the wait
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
    grid_wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(start, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if EVEN:
            wt = tl.load(rows + k[None, :], eviction_policy="evict_first")
            xt = tl.load(tokens + k[:, None], mask=m[None, :] < M, other=0.0)
        else:
            wt = tl.load(rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < end), other=0.0)
            xt = tl.load(tokens + k[:, None], mask=(m[None, :] < M) & (k[:, None] < end), other=0.0)
        acc = tl.dot(wt, xt, acc, input_precision="ieee")
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
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)


@cache
def _arrivals(device: torch.device) -> Tensor:
    return torch.zeros(65536, dtype=torch.int32, device=device)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int, t: Tiling) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    partial = torch.empty(t.split_k * M * N, dtype=torch.float32, device=x.device) if t.split_k > 1 else out
    even = N % t.block_n == 0 and K % (t.block_k * t.split_k) == 0
    _linear[(triton.cdiv(N, t.block_n), t.split_k, triton.cdiv(M, block_m))](
        x,
        weight,
        x if bias is None else bias,
        out,
        partial,
        _arrivals(x.device),
        M,
        N,
        K,
        x.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        SPLIT_K=t.split_k,
        HAS_BIAS=bias is not None,
        EVEN=even,
        AHEAD=AHEAD if even and AHEAD * t.block_k * t.split_k <= K else 0,
        num_stages=t.num_stages,
        num_warps=t.num_warps,
        **launch_options(x.device),
    )
    return out


@cache
def tiling(rows: int, out_features: int, in_features: int, num_sms: int) -> Tiling | None:
    """How to cut a product of few rows so that its programs just fill the GPU; None: cuBLAS is as fast."""
    for split in (2, 4):
        programs = out_features // 64 * split
        whole = out_features % 64 == 0 and in_features % (128 * split) == 0
        if whole and 0.7 * num_sms <= programs <= num_sms and in_features >= 1024:
            return Tiling(64, 128, split, num_stages=5 if rows > 32 else 6, num_warps=8 if 16 < rows <= 32 else 4)
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
    """`x @ weight.T + bias`; x `[num_tokens, in]`, weight `[out, in]`.

    batch_invariant: one tiling whatever the number of tokens, which sums in the same order for every row.
    """
    if batch_invariant:
        wide = x.dtype == torch.float32
        return _launch(x, weight, bias, 64, Tiling(64, 32 if wide else 64, 1, num_stages=3, num_warps=4))
    rows = x.shape[0]
    if rows <= MAX_ROWS and x.dtype in (torch.float16, torch.bfloat16) and weight.is_cuda:
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        chosen = tiling(rows, *weight.shape, sms)
        if chosen is not None:
            return _launch(x, weight, bias, max(16, triton.next_power_of_2(rows)), chosen)
    return F.linear(x, weight, bias)
