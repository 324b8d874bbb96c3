"""Rotation and the store into the KV cache in one launch; the tables of angles. Twins: kernels/reference/fused.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import assert_heads_side_by_side, grid_launch, grid_wait, launch_options


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
    """A head (or several: pointers `[heads, BLOCK_D]`), rotated unless PAIRS is 0; cos, sin: of its token."""
    x = tl.load(head, mask=inside, other=0.0)
    if PAIRS > 0:
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
        x = (x.to(tl.float32) * c + sign * y * s).to(x.dtype)
    return x


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
        cos += token * PAIRS
        sin += token * PAIRS
        turned = _rotated(queries, mine, d[None, :], cos, sin, PAIRS, INTERLEAVED)
        key_out = _rotated(key, inside, d, cos, sin, PAIRS, INTERLEAVED)
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
