"""Online softmax over tiles of keys, which decode and prefill share (attention_kernels.py).

K and V are converted to q's dtype as they are read, so a cache may be fp8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Fixed(NamedTuple):
    """What a kernel is compiled for; no tensor, so that it stays a constant where it is passed on."""

    KV_HEADS: Any
    HEAD_DIM: Any
    BLOCK_N: Any  # keys of a tile
    BLOCK_SIZE: Any
    CONTIGUOUS: Any
    WINDOW: Any
    SOFTCAP: Any
    ALIBI: Any
    ASM: Any  # of Hopper and newer


class Cache(NamedTuple):
    """The keys and values of an entry and one kv head."""

    k: Any
    v: Any
    table: Any  # row of the block table
    base: Any  # first slot of a slab's row
    head: Any


class Score(NamedTuple):
    """What becomes of a product of query and key."""

    scale: Any
    softcap: Any
    slopes: Any  # [M], of ALiBi


@triton.jit
def _slots(cache, keys, inside, FIXED: tl.constexpr, EDGE: tl.constexpr):
    """Flat cache index of each key, int64."""
    if FIXED.CONTIGUOUS:
        return cache.base + keys
    if EDGE:
        block = tl.load(cache.table + keys // FIXED.BLOCK_SIZE, mask=inside, other=0)
    else:
        block = tl.load(cache.table + keys // FIXED.BLOCK_SIZE)
    return block.to(tl.int64) * FIXED.BLOCK_SIZE + keys % FIXED.BLOCK_SIZE


@triton.jit
def _load_tile(tile, inside, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """K or V `[BLOCK_N, BLOCK_D]`, zero outside; no mask where none is needed."""
    if EDGE:
        if BLOCK_D != HEAD_DIM:
            return tl.load(tile, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        return tl.load(tile, mask=inside[:, None], other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(tile, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(tile)


@triton.jit
def _scores(s, keys, score, FIXED: tl.constexpr):
    """Scores in units of log2."""
    if not FIXED.SOFTCAP and not FIXED.ALIBI:
        return s * (score.scale * LOG2_E)
    s = s * score.scale
    if FIXED.SOFTCAP:
        s = score.softcap * (2.0 * tl.sigmoid(2.0 * s / score.softcap) - 1.0)  # tanh
    if FIXED.ALIBI:
        s += score.slopes[:, None] * keys[None, :]
    return s * LOG2_E


@triton.jit
def _query(tile, k_cache):
    """Queries in the type of the products: fp8 is exact in fp16 too, and becomes it in one instruction, not in five."""
    if k_cache.dtype.element_ty == tl.float8e4nv and tile.dtype == tl.bfloat16:
        return tile.to(tl.float16)
    else:
        return tile


@triton.jit
def _halves(pairs, ASM: tl.constexpr):
    """Pairs of fp8, as uint16 -> the first and the second of each, fp16."""
    if ASM:  # two pairs at a time
        code: tl.constexpr = """{ .reg .b16 a, b; .reg .b32 x, y; mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b;
            prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632; }"""
        return tl.inline_asm_elementwise(code, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        first = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        second = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def _attend(
    state,  # m [M] maxima so far, total [M] sums, acc [M, BLOCK_D] unnormalised output
    q,  # [M, BLOCK_D]
    q_pos,  # [M] position of each query
    cache,
    score,
    begin,
    end,
    FIXED: tl.constexpr,
    EDGE: tl.constexpr,  # the last tile may end before `end` does
    MASKED: tl.constexpr,  # some query may not see some key: it comes later, or has left the window
):
    """Online softmax over keys [begin, end) in tiles of BLOCK_N; -> state.

    fp8 is read in pairs, each half of which has its own product: 8-bit elements would reach the matrix unit, which
    wants V transposed, one by one.
    """
    m, total, acc = state
    FP8: tl.constexpr = cache.k.dtype.element_ty == tl.float8e4nv
    PER_LOAD: tl.constexpr = 2 if FP8 else 1  # elements
    HEAD_DIM: tl.constexpr = FIXED.HEAD_DIM // PER_LOAD
    M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1] // PER_LOAD
    d = tl.arange(0, BLOCK_D)
    k_cache, v_cache = cache.k, cache.v
    if FP8:
        k_cache = k_cache.to(tl.pointer_type(tl.uint16))
        v_cache = v_cache.to(tl.pointer_type(tl.uint16))
        q, q2 = tl.split(tl.reshape(q, [M, BLOCK_D, 2]))
        acc, acc2 = tl.split(tl.reshape(acc, [M, BLOCK_D, 2]))
    for start in range(begin, end, FIXED.BLOCK_N):
        keys = start + tl.arange(0, FIXED.BLOCK_N)
        inside = keys < end
        slots = _slots(cache, keys, inside, FIXED, EDGE)
        where = ((slots * FIXED.KV_HEADS + cache.head) * HEAD_DIM)[:, None] + d[None, :]
        k = _load_tile(k_cache + where, inside, d, HEAD_DIM, BLOCK_D, EDGE)
        v = _load_tile(v_cache + where, inside, d, HEAD_DIM, BLOCK_D, EDGE)
        if FP8:
            k, k2 = _halves(k, FIXED.ASM)
            v, v2 = _halves(v, FIXED.ASM)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if FP8:
            s = tl.dot(q2, tl.trans(k2.to(q.dtype)), s, input_precision="ieee")
        s = _scores(s, keys, score, FIXED)
        if EDGE:
            s = tl.where(inside[None, :], s, float("-inf"))
        if MASKED:
            visible = keys[None, :] <= q_pos[:, None]
            if FIXED.WINDOW > 0:
                visible = visible & (keys[None, :] > q_pos[:, None] - FIXED.WINDOW)
            s = tl.where(visible, s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        safe = higher
        if MASKED:
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet that this query sees
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(q.dtype)
        acc = tl.dot(p, v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        if FP8:
            acc2 = tl.dot(p, v2.to(q.dtype), acc2 * shrink[:, None], input_precision="ieee")
        m = higher
    if FP8:
        acc = tl.interleave(acc, acc2)
    return m, total, acc
