"""The kernels of attention: split-KV decode, and prefill in query tiles.

Token t of an entry lies at `block_table[row, t // block_size] * block_size + t % block_size`; a slab is the case of one
table column. Nothing past an entry's length is ever multiplied, so stale or poisoned memory cannot leak. What varies
from step to step (metadata, in a staging buffer at any offset) is not specialised on, or kernels would be compiled
while serving; strides and the caches are, and head sizes are constants, so that K and V are read 16 bytes at a time.
The loop is in attention_tile.py, what becomes of an entry's shares in attention_merge.py, launches in attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flover.kernels.triton.attention_merge import _merged, _store_heads, _store_part
from flover.kernels.triton.attention_tile import Cache, Fixed, Score, _attend, _query, _scores, _slots
from flover.kernels.triton.common import grid_launch, grid_wait, prefetch
from flover.kernels.triton.rotary import _rotated, _to_cache


@triton.jit
def _share(length, number, share, SHARE_UNIT: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr):
    """Keys [begin, end) of a share, and how many shares the entry has.

    EVEN: all of an entry are of one size, as far as there are units; else all but the last are as large as allowed. A
    window is divided by as many programs as the whole entry has.
    """
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    if EVEN or WINDOW > 0:
        programs = tl.maximum(tl.cdiv(length, share), 1)
        share = tl.maximum(tl.cdiv(tl.cdiv(length - first, programs), SHARE_UNIT), 1) * SHARE_UNIT
    begin = first + number * share
    return begin, tl.minimum(begin + share, length), tl.cdiv(length - first, share)


@triton.jit
def _entry_cache(k_cache, v_cache, block_table, row, stride_table, head, BLOCK_SIZE: tl.constexpr):
    table = block_table + row.to(tl.int64) * stride_table
    base = tl.load(table).to(tl.int64) * BLOCK_SIZE
    return Cache(k_cache, v_cache, table, base, head)


@triton.jit
def _prefetch_tile(cache, begin, end, BLOCK_D: tl.constexpr, FIXED: tl.constexpr):
    """The first tile of K and V of keys [begin, end) into L2."""
    LINE: tl.constexpr = 1024 // cache.k.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    LINES: tl.constexpr = (BLOCK_D + LINE - 1) // LINE
    keys = begin + tl.arange(0, FIXED.BLOCK_N)
    inside = keys < end
    places = tl.where(inside, _slots(cache, keys, inside, FIXED, True), 0)
    of_key = tl.minimum(tl.arange(0, LINES) * LINE, FIXED.HEAD_DIM - 1)
    where = ((places * FIXED.KV_HEADS + cache.head) * FIXED.HEAD_DIM)[:, None] + of_key[None, :]
    prefetch(cache.k + where)
    prefetch(cache.v + where)


@triton.jit
def _own_key(
    key, value, cos, sin, cache, slots, store, d, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FIXED: tl.constexpr
):
    """The entry's own key, rotated, and value, in the cache's type; stored if `store` says so and there is a slot."""
    inside = d < FIXED.HEAD_DIM
    new_k = _rotated(key, inside, d, cos, sin, PAIRS, INTERLEAVED)
    new_v = tl.load(value, mask=inside, other=0.0)
    new_k, new_v = _to_cache(new_k, cache.k), _to_cache(new_v, cache.v)
    slot = tl.load(slots)
    if store & (slot >= 0):
        place = (slot * FIXED.KV_HEADS + cache.head) * FIXED.HEAD_DIM + d
        tl.store(cache.k + place, new_k, mask=inside)
        tl.store(cache.v + place, new_v, mask=inside)
    return new_k, new_v


@triton.jit
def _newest(q, k, v, position, counts, score, FIXED: tl.constexpr):
    """The state of `_attend` after one key that is in registers; where it does not count, before any."""
    s = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
    s = _scores(s[:, None], position + tl.arange(0, 1), score, FIXED)
    m = tl.where(counts, tl.sum(s, 1), float("-inf"))
    total = tl.where(counts, tl.full([q.shape[0]], 1.0, tl.float32), 0.0)
    acc = tl.where(counts, tl.zeros(q.shape, tl.float32) + v.to(tl.float32)[None, :], 0.0)
    return m, total, acc


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=[
        "cos",
        "sin",
        "slots",
        "block_table",
        "rows",
        "seq_lens",
        "share_keys",
        "share_entry",
        "share_number",
        "slopes_ptr",
    ],
)
def decode(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    out,
    k_cache,
    v_cache,
    block_table,
    rows,
    seq_lens,
    share_keys,
    share_entry,
    share_number,
    slopes_ptr,
    part_acc,  # [kv_heads, num_shares, group, HEAD_DIM]
    part_m,  # [kv_heads, num_shares, 2, group]
    arrived,  # [num_entries * kv_heads] int32, zero before and after
    scale,
    softcap,
    stride_q,
    stride_k,
    stride_v,
    stride_table,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head, padded to a power of two
    SHARE_UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: a share of an entry's keys and one kv head, for all of its query heads.

    The entry's own key and value come from this step's projection: every share rotates the query, and the last one the
    key, stores both, and begins with them; so K and V are read up to the token before.
    What it reads before `grid_wait` was written before the step's embedding, which is no kernel of ours and so has
    waited for all that came before it: lengths, tables, and the keys of earlier steps.
    """
    grid_launch(PDL)
    head, share = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = NUM_HEADS // KV_HEADS
    FIXED: tl.constexpr = Fixed(
        KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_SIZE, CONTIGUOUS, WINDOW, SOFTCAP, ALIBI, ASM=PDL
    )  # fmt: skip
    entry, number = tl.load(share_entry + share), tl.load(share_number + share)
    length = tl.load(seq_lens + entry, mask=entry >= 0, other=0)
    row = tl.load(rows + entry, mask=entry >= 0, other=0)
    begin, end, used = _share(length, number, tl.load(share_keys), SHARE_UNIT, WINDOW, EVEN)
    cache = _entry_cache(k_cache, v_cache, block_table, row, stride_table, head, BLOCK_SIZE)
    if PDL and begin < length:
        _prefetch_tile(cache, begin, tl.minimum(end, length - 1), BLOCK_D, FIXED)
    grid_wait(PDL)
    if begin < length:
        h = tl.arange(0, GROUP if GROUP > 16 else 16)  # the least that the matrix unit takes
        d = tl.arange(0, BLOCK_D)
        real = h < group
        q_head = head * group + h
        mask = real[:, None] & (d < HEAD_DIM)[None, :]
        token = entry.to(tl.int64)
        query = q + token * stride_q + q_head[:, None] * HEAD_DIM + d[None, :]
        key = k + token * stride_k + head * HEAD_DIM + d
        value = v + token * stride_v + head * HEAD_DIM + d
        c, s = cos + token * PAIRS, sin + token * PAIRS
        q_tile = _rotated(query, mask, d[None, :], c, s, PAIRS, INTERLEAVED)
        last = end == length
        new_k, new_v = _own_key(key, value, c, s, cache, slots + token, last, d, PAIRS, INTERLEAVED, FIXED)
        q_tile = _query(q_tile, k_cache)
        slopes = h.to(tl.float32)
        if ALIBI:
            slopes = tl.load(slopes_ptr + q_head, mask=real, other=0.0).to(tl.float32)
        score = Score(scale, softcap, slopes)
        state = _newest(q_tile, new_k, new_v, length - 1, last, score, FIXED)
        q_pos = h  # not read: the one query sees every key
        old = tl.minimum(end, length - 1)
        m, total, acc = _attend(state, q_tile, q_pos, cache, score, begin, old, FIXED, EDGE=True, MASKED=False)
        first_head = token * NUM_HEADS + head * group
        if used == 1:
            _store_heads(out, (total, acc), first_head, h, d, group, HEAD_DIM)
        else:
            unit = token * KV_HEADS + head
            part = (head * tl.num_programs(1) + share).to(tl.int64)
            _store_part(part_acc, part_m, part, (m, total, acc), h, d, group, HEAD_DIM)
            tl.debug_barrier()
            if tl.atomic_add(arrived + unit, 1, sem="acq_rel") == used - 1:
                g = tl.arange(0, GROUP)
                result = _merged(part_acc, part_m, part - number, used, g, d, group, HEAD_DIM)
                _store_heads(out, result, first_head, g, d, group, HEAD_DIM)
                tl.store(arrived + unit, 0)


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=[
        "block_table",
        "rows",
        "seq_lens",
        "query_start",
        "tile_entry",
        "tile_start",
        "slopes_ptr",
    ],
)
def prefill(
    q,
    out,
    k_cache,
    v_cache,
    block_table,
    rows,
    seq_lens,
    query_start,
    tile_entry,
    tile_start,
    slopes_ptr,
    scale,
    softcap,
    stride_q,
    stride_table,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: a tile of an entry's queries, each with PACK query heads of one kv head.

    So a row of the tile is a query and a head, and K and V are read, and the causal edge wasted, once for all of them.
    Keys begin at a multiple of BLOCK_N, so that tiles of keys are the same for every query. Those that some query of
    the tile does not see, at the diagonal and at the far edge of a window, are masked; what lies between is not.
    """
    FIXED: tl.constexpr = Fixed(
        KV_HEADS, HEAD_DIM, BLOCK_N, BLOCK_SIZE, CONTIGUOUS, WINDOW, SOFTCAP, ALIBI, ASM=PDL
    )  # fmt: skip
    grid_launch(PDL)
    tile = tl.program_id(1)
    grid_wait(PDL)
    entry = tl.load(tile_entry + tile)
    if entry >= 0:
        length = tl.load(seq_lens + entry)
        first_query = tl.load(query_start + entry)
        q_len = tl.load(query_start + entry + 1) - first_query
        start = tl.load(tile_start + tile)
        i = tl.arange(0, BLOCK_M)
        index = start + i // PACK  # of the query within its entry
        q_head = tl.program_id(0) * PACK + i % PACK
        q_pos = index + (length - q_len)
        mine = (index >= 0) & (index < q_len)
        head = tl.program_id(0) * PACK // (NUM_HEADS // KV_HEADS)
        cache = _entry_cache(k_cache, v_cache, block_table, tl.load(rows + entry), stride_table, head, BLOCK_SIZE)
        d = tl.arange(0, BLOCK_D)
        q_mask = mine[:, None] & (d < HEAD_DIM)[None, :]
        token = (first_query + index).to(tl.int64)
        where = token[:, None] * stride_q + q_head[:, None] * HEAD_DIM + d[None, :]
        q_tile = tl.load(q + where, mask=q_mask, other=0.0)
        q_tile = _query(q_tile, k_cache)
        slopes = tl.zeros([BLOCK_M], tl.float32)
        if ALIBI:
            slopes += tl.load(slopes_ptr + q_head).to(tl.float32)
        score = Score(scale, softcap, slopes)
        first = start + length - q_len  # position of the tile's first query
        last = first + BLOCK_M // PACK  # behind its last one
        end = tl.minimum(last, length)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        diagonal = (first + 1) // BLOCK_N * BLOCK_N  # every query sees the keys before it, but for the window
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        state = (m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
        if WINDOW > 0:
            left = begin  # keys that the last query no longer sees
            begin = tl.cdiv(tl.maximum(last - WINDOW, 0), BLOCK_N) * BLOCK_N
            begin = tl.minimum(begin, diagonal)
            state = _attend(state, q_tile, q_pos, cache, score, left, begin, FIXED, EDGE=False, MASKED=True)
        state = _attend(state, q_tile, q_pos, cache, score, begin, diagonal, FIXED, EDGE=False, MASKED=False)
        m, total, acc = _attend(state, q_tile, q_pos, cache, score, diagonal, end, FIXED, EDGE=True, MASKED=True)
        o = out + (token[:, None] * NUM_HEADS + q_head[:, None]) * HEAD_DIM + d[None, :]
        tl.store(o, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
