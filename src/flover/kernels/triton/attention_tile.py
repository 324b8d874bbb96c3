"""Online softmax over tiles of keys, which decode and prefill share (attention_kernels.py).

K and V are converted to q's dtype as they are read, so a cache may be fp8.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _slots(table, keys, inside, base, BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr, EDGE: tl.constexpr):
    """Flat cache index of each key, int64; base: of a slab's row."""
    if CONTIGUOUS:
        return base + keys
    if EDGE:
        block = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0)
    else:
        block = tl.load(table + keys // BLOCK_SIZE)
    return block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE


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
def _scores(s, keys, slopes, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores in units of log2."""
    if not SOFTCAP and not ALIBI:
        return s * (scale * LOG2_E)
    s = s * scale
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    if ALIBI:
        s += slopes[:, None] * keys[None, :]
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
    m,  # [M] maxima so far
    total,  # [M] sums
    acc,  # [M, BLOCK_D] unnormalised output
    q,  # [M, BLOCK_D]
    q_pos,  # [M] position of each query
    slopes,
    k_cache,
    v_cache,
    table,
    base,
    head,
    begin,
    end,  # keys
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    EDGE: tl.constexpr,  # the last tile may end before `end` does
    MASKED: tl.constexpr,  # some query may not see some key: it comes later, or has left the window
    ASM: tl.constexpr,  # of Hopper and newer
):
    """Online softmax over keys [begin, end) in tiles of BLOCK_N; -> m, total, acc.

    fp8 is read in pairs, each half of which has its own product: 8-bit elements would reach the matrix unit, which
    wants V transposed, one by one.
    """
    FP8: tl.constexpr = k_cache.dtype.element_ty == tl.float8e4nv
    WIDTH: tl.constexpr = 2 if FP8 else 1  # elements of a load
    d = tl.arange(0, BLOCK_D // WIDTH)
    if FP8:
        k_cache = k_cache.to(tl.pointer_type(tl.uint16))
        v_cache = v_cache.to(tl.pointer_type(tl.uint16))
        M: tl.constexpr = q.shape[0]
        q, q2 = tl.split(tl.reshape(q, [M, BLOCK_D // 2, 2]))
        acc, acc2 = tl.split(tl.reshape(acc, [M, BLOCK_D // 2, 2]))
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        slots = _slots(table, keys, inside, base, BLOCK_SIZE, CONTIGUOUS, EDGE)
        where = ((slots * KV_HEADS + head) * (HEAD_DIM // WIDTH))[:, None] + d[None, :]
        k = _load_tile(k_cache + where, inside, d, HEAD_DIM // WIDTH, BLOCK_D // WIDTH, EDGE)
        v = _load_tile(v_cache + where, inside, d, HEAD_DIM // WIDTH, BLOCK_D // WIDTH, EDGE)
        if FP8:
            k, k2 = _halves(k, ASM)
            v, v2 = _halves(v, ASM)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if FP8:
            s = tl.dot(q2, tl.trans(k2.to(q.dtype)), s, input_precision="ieee")
        s = _scores(s, keys, slopes, scale, softcap, SOFTCAP, ALIBI)
        if EDGE:
            s = tl.where(inside[None, :], s, float("-inf"))
        if MASKED:
            visible = keys[None, :] <= q_pos[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > q_pos[:, None] - WINDOW)
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
