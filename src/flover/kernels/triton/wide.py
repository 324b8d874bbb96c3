"""Gate and up with the activation in one launch: of 33 to 128 rows, and of very many, which are bound by arithmetic.

A program multiplies up to 128 rows of x with as many features as, of few rows, bring the number of programs just under
that of multiprocessors. That is no power of two, so up to three tiles of such share a step (112 = 64 + 32 + 16), each
with an accumulator. The weight is seen as `[2, features, in]`, so one tile of TMA holds the gate and the up of its
features, and they end in one program. What lies outside is zero: the weight need not be whole tiles, nor x. Of few rows
cuBLAS cuts this product in tiles of 128 and leaves multiprocessors idle; of many it is as fast, but the activation is
then a launch that writes and reads what here stays in registers (docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options, prefetch
from flover.kernels.triton.fused import _gated
from flover.kernels.triton.product import block_m

ROWS = range(33, 129)  # fewer: product.py has as narrow a tile of tokens as they are
ROUNDS = 6  # of programs, from which on it counts little that the last one leaves multiprocessors idle
GROUP = 16  # tiles of rows whose programs are neighbours, so that L2 has what they read
FEATURES = range(96, 177)  # fewer: x is most of what is read; more: accumulators leave the registers
BLOCK_K = 64  # 128 bytes, the widest row that TMA swizzles


class Cut(NamedTuple):
    """Features of one program, a multiple of 16, and tiles in flight."""

    features: int
    num_stages: int


@triton.jit
def _add(acc, xt, w, n, at):
    """`acc + xt @ w.T` for the tile of gate and up at n."""
    return tl.dot(xt, w.load([0, n, at]).reshape(acc.shape[1], xt.shape[1]).T, acc)


@triton.jit
def _store(acc, out, m0, n, M, width, GATE: tl.constexpr):
    gate, up = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
    value = _gated(gate, up, out.dtype.element_ty, GATE)
    m = m0 + tl.arange(0, acc.shape[0])[:, None]
    n += tl.arange(0, acc.shape[1] // 2)[None, :]
    tl.store(out + m.to(tl.int64) * width + n, value, mask=(m < M) & (n < width))


@triton.jit(do_not_specialize=["M"])
def _gated_linear(
    x,  # this and the next three are descriptors: [M, K]
    w1,  # [2, width, K]
    w2,
    w3,
    weight,
    out,  # [M, width]
    M,
    width,
    K,
    F1: tl.constexpr,  # features of each tile, 0: there is none
    F2: tl.constexpr,
    F3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    per_group = GROUP * tl.cdiv(width, F1 + F2 + F3)
    first, place = tl.program_id(0) // per_group * GROUP, tl.program_id(0) % per_group
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)  # the last one may have fewer tiles of rows
    m0 = (first + place % group) * BLOCK_M
    n1 = place // group * (F1 + F2 + F3)
    n2 = n1 + F1
    n3 = n2 + F2
    if PDL:  # two tiles go to L2 before the wait: weights depend on no one
        rows = tl.minimum(n1 + tl.arange(0, 256), tl.minimum(n3 + F3, width) - 1)
        lines = weight + rows.to(tl.int64)[:, None] * K + tl.arange(0, 2)[None, :] * BLOCK_K
        prefetch(lines)
        prefetch(lines + width.to(tl.int64) * K)
    grid_wait(PDL)
    acc1 = tl.zeros([BLOCK_M, 2 * F1], tl.float32)
    if F2 > 0:
        acc2 = tl.zeros([BLOCK_M, 2 * F2], tl.float32)
    if F3 > 0:
        acc3 = tl.zeros([BLOCK_M, 2 * F3], tl.float32)
    for at in range(0, K, BLOCK_K):
        xt = x.load([m0, at])
        acc1 = _add(acc1, xt, w1, n1, at)
        if F2 > 0:
            acc2 = _add(acc2, xt, w2, n2, at)
        if F3 > 0:
            acc3 = _add(acc3, xt, w3, n3, at)
    _store(acc1, out, m0, n1, M, width, GATE)
    if F2 > 0:
        _store(acc2, out, m0, n2, M, width, GATE)
    if F3 > 0:
        _store(acc3, out, m0, n3, M, width, GATE)


@cache
def cut(rows: int, width: int, num_sms: int, shared: int) -> Cut | None:
    """Of few rows the fewest features of a program for which all run at once.

    None: another kernel is faster, too many multiprocessors would be idle, or there is no room for three tiles.
    """
    few = rows in ROWS
    if not few and (rows < ROWS.start or triton.cdiv(rows, 128) * triton.cdiv(width, 128) < ROUNDS * num_sms):
        return None
    features = 16 * triton.cdiv(width, 16 * num_sms) if few else 128
    room = shared - 2048  # of a multiprocessor, less what the system and the barriers take
    stages = min(4 if few else 3, room // (2 * BLOCK_K * (block_m(rows) + 2 * features)))
    idle = few and triton.cdiv(width, features) < 0.8 * num_sms
    return None if features not in FEATURES or idle or stages < 3 else Cut(features, stages)


def cut_for(x: Tensor, weight: Tensor) -> Cut | None:
    """`cut`, and None as well for what TMA cannot address: other than 16 bits, off 16 bytes, or before Hopper."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    even = weight.shape[1] % (2 * BLOCK_K) == 0  # two tiles are fetched ahead
    if x.element_size() != 2 or not aligned or not even or not launch_options(x.device)["PDL"]:
        return None
    gpu = torch.cuda.get_device_properties(x.device)
    return cut(len(x), len(weight) // 2, gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor)


def gated_wide(x: Tensor, weight: Tensor, name: str, c: Cut) -> Tensor:
    """act(x @ gate.T) * (x @ up.T) in 16 bits; weight = gate over up."""
    (M, K), width, tile = x.shape, len(weight) // 2, block_m(len(x))
    out = torch.empty(M, width, dtype=x.dtype, device=x.device)
    tiles = [f for f in (128, 64, 32, 16) if c.features & f]
    halves = weight.view(2, width, K)
    maps = [TensorDescriptor.from_tensor(halves, [2, f, BLOCK_K]) for f in tiles]
    f1, f2, f3 = (*tiles, 0, 0)[:3]
    _gated_linear[(triton.cdiv(M, tile) * triton.cdiv(width, c.features),)](
        TensorDescriptor.from_tensor(x, [tile, BLOCK_K]),
        *(*maps, maps[0], maps[0])[:3],
        weight,
        out,
        M,
        width,
        K,
        F1=f1,
        F2=f2,
        F3=f3,
        BLOCK_M=tile,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        GATE=name,
        num_stages=c.num_stages,
        num_warps=tile // 16,
        **launch_options(x.device),
    )
    return out
