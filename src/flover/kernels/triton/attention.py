"""Attention over the KV cache on a GPU: split-KV decode, and prefill in query tiles; one launch each.

Token t of an entry lies at `block_table[row, t // block_size] * block_size + t % block_size`; a slab is the case of one
table column. Invariants: grids depend on shapes alone, never on lengths, so that a CUDA graph can hold a launch
(programs without work end at once); nothing past an entry's length is ever multiplied, so stale or poisoned memory
cannot leak; one load of K and V serves all query heads of its group. Sources: FlashAttention-2 (Dao 2023),
Flash-Decoding (Dao et al. 2023), paged attention (Kwon et al. 2023). The twin is kernels/reference/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options

PREFILL_TILE = 128  # queries of one program
INVARIANT_TILE = 16  # the same, batch-invariant: tiles begin at multiples of it in absolute positions
PROGRAMS = 528  # that a decode launch aims at: four for each multiprocessor of an H100 or H200
MAX_SPLITS = 32
MIN_SPLIT = 64  # keys that are worth a program of their own

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class DeviceMetadata:
    """Where queries and histories lie, on the device; addresses are static, so that a graph can hold them.

    block_table: [max_rows, max_blocks] int32. rows: [num_entries] int32, the table row of each entry.
    seq_lens: [num_entries] int32, history after this step's tokens are stored; 0: padding, computes nothing.
    query_start: [num_entries + 1] int32, offsets of the entries' queries in the packed batch.
    num_decode: entries [0, num_decode) have one query each, at the packed index of the entry.
    tile_entry, tile_start: [num_tiles] int32, of each prefill tile its entry and first query, see `prefill_tiles`.
    """

    block_table: Tensor
    rows: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode: int
    tile_entry: Tensor | None
    tile_start: Tensor | None
    block_size: int
    contiguous: bool


def prefill_tiles(q_lens: npt.ArrayLike, first_entry: int) -> tuple[Ints, Ints]:
    """Tiles of entries first_entry, ...: (entry, index of the first query within it), those with most keys first."""
    lens = np.asarray(q_lens, dtype=np.int64)
    tiles = -(-lens // PREFILL_TILE)
    entry = np.repeat(np.arange(len(lens)), tiles)
    start = (np.arange(len(entry)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * PREFILL_TILE
    order = np.argsort(-start, kind="stable")
    return (entry + first_entry)[order].astype(np.int32), start[order].astype(np.int32)


def invariant_tiles(q_lens: npt.ArrayLike, seq_lens: npt.ArrayLike) -> tuple[Ints, Ints]:
    """Tiles of all entries for the batch-invariant mode; a start is negative where a tile begins before the chunk."""
    lens = np.asarray(q_lens, dtype=np.int64)
    first = np.asarray(seq_lens, dtype=np.int64) - lens  # position of the first query
    low = first // INVARIANT_TILE
    tiles = (first + lens - 1) // INVARIANT_TILE - low + 1
    entry = np.repeat(np.arange(len(lens)), tiles)
    number = np.arange(len(entry)) - np.repeat(np.cumsum(tiles) - tiles, tiles) + low[entry]
    return entry.astype(np.int32), (number * INVARIANT_TILE - first[entry]).astype(np.int32)


@triton.jit
def _slots(table, keys, inside, base, BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Flat cache index of each key, int64; base: of a slab's row."""
    if CONTIGUOUS:
        return base + keys
    block = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE


@triton.jit
def _scores(s, q_pos, k_pos, slopes, scale, softcap, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores in units of log2, masked: causal and in the window."""
    s = s * scale
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    if ALIBI:
        s += slopes[:, None] * k_pos[None, :]
    visible = k_pos[None, :] <= q_pos[:, None]
    if WINDOW > 0:
        visible = visible & (k_pos[None, :] > q_pos[:, None] - WINDOW)
    return tl.where(visible, s * 1.4426950408889634, float("-inf"))


@triton.jit
def _attend(
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
    M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Online softmax over keys [begin, end) in tiles of BLOCK_N; -> maxima, sums, unnormalised output."""
    d = tl.arange(0, BLOCK_D)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        slots = _slots(table, keys, inside, base, BLOCK_SIZE, CONTIGUOUS)
        where = (slots * KV_HEADS + head) * HEAD_DIM
        mask = inside[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (d[None, :] < HEAD_DIM)
        k = tl.load(k_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = _scores(s, q_pos, keys, slopes, scale, softcap, WINDOW, SOFTCAP, ALIBI)
        s = tl.where(inside[None, :], s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet that this query sees
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = higher
    return m, total, acc


@triton.jit
def _decode(
    q,
    out,
    k_cache,
    v_cache,
    block_table,
    rows,
    seq_lens,
    slopes_ptr,
    part_acc,  # [num_entries, kv_heads, SPLITS, GROUP, BLOCK_D]
    part_m,  # [num_entries, kv_heads, SPLITS, 2, GROUP]
    arrived,  # [num_entries * kv_heads] int32, zero before and after
    scale,
    softcap,
    stride_q,
    stride_table,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head, padded to 16
    SPLITS: tl.constexpr,
    SPLIT_UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    head, entry, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = NUM_HEADS // KV_HEADS
    grid_wait(PDL)
    length = tl.load(seq_lens + entry)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    per_split = tl.cdiv(tl.cdiv(length - first, SPLITS), SPLIT_UNIT) * SPLIT_UNIT
    used = tl.cdiv(length - first, tl.maximum(per_split, 1))
    begin = first + split * per_split
    if begin < length:
        table = block_table + tl.load(rows + entry).to(tl.int64) * stride_table
        base = tl.load(table).to(tl.int64) * BLOCK_SIZE
        h = tl.arange(0, GROUP)
        d = tl.arange(0, BLOCK_D)
        q_head = head * group + h
        q_mask = (h < group)[:, None] & (d < HEAD_DIM)[None, :]
        q_tile = tl.load(
            q + entry.to(tl.int64) * stride_q + q_head[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0
        )
        slopes = h.to(tl.float32)
        if ALIBI:
            slopes = tl.load(slopes_ptr + q_head, mask=h < group, other=0.0)
        q_pos = h * 0 + (length - 1)
        m, total, acc = _attend(
            q_tile,
            q_pos,
            slopes,
            k_cache,
            v_cache,
            table,
            base,
            head,
            begin,
            tl.minimum(begin + per_split, length),
            scale,
            softcap,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            GROUP,
            BLOCK_SIZE,
            CONTIGUOUS,
            WINDOW,
            SOFTCAP,
            ALIBI,
        )
        o = out + (entry.to(tl.int64) * NUM_HEADS + q_head[:, None]) * HEAD_DIM + d[None, :]
        if SPLITS == 1:
            tl.store(o, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
        else:
            if used == 1:
                tl.store(o, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
            else:
                unit = entry.to(tl.int64) * KV_HEADS + head
                part = unit * SPLITS + split
                tl.store(part_acc + (part * GROUP + h[:, None]) * BLOCK_D + d[None, :], acc)
                tl.store(part_m + part * 2 * GROUP + h, m)
                tl.store(part_m + (part * 2 + 1) * GROUP + h, total)
                tl.debug_barrier()
                if tl.atomic_add(arrived + unit, 1, sem="acq_rel") == used - 1:
                    m = tl.full([GROUP], float("-inf"), tl.float32)
                    total = tl.zeros([GROUP], tl.float32)
                    acc = tl.zeros([GROUP, BLOCK_D], tl.float32)
                    for i in range(used):  # in order, so that the result is always the same
                        other = unit * SPLITS + i
                        m_i = tl.load(part_m + other * 2 * GROUP + h, cache_modifier=".cg")
                        total_i = tl.load(part_m + (other * 2 + 1) * GROUP + h, cache_modifier=".cg")
                        acc_i = tl.load(
                            part_acc + (other * GROUP + h[:, None]) * BLOCK_D + d[None, :], cache_modifier=".cg"
                        )
                        higher = tl.maximum(m, m_i)
                        a, b = tl.exp2(m - higher), tl.exp2(m_i - higher)
                        total = total * a + total_i * b
                        acc = acc * a[:, None] + acc_i * b[:, None]
                        m = higher
                    tl.store(o, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
                    tl.store(arrived + unit, 0)


@triton.jit
def _prefill(
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
    BLOCK_SIZE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,  # keys begin at a multiple of it, so that tiles of keys are the same for every query
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    q_head, tile = tl.program_id(0), tl.program_id(1)
    grid_wait(PDL)
    entry = tl.load(tile_entry + tile)
    if entry >= 0:
        length = tl.load(seq_lens + entry)
        first_query = tl.load(query_start + entry)
        q_len = tl.load(query_start + entry + 1) - first_query
        index = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)  # of the query within its entry
        q_pos = index + (length - q_len)
        mine = (index >= 0) & (index < q_len)
        table = block_table + tl.load(rows + entry).to(tl.int64) * stride_table
        base = tl.load(table).to(tl.int64) * BLOCK_SIZE
        head = q_head // (NUM_HEADS // KV_HEADS)
        d = tl.arange(0, BLOCK_D)
        q_mask = mine[:, None] & (d < HEAD_DIM)[None, :]
        token = (first_query + index).to(tl.int64)
        q_tile = tl.load(q + token[:, None] * stride_q + q_head * HEAD_DIM + d[None, :], mask=q_mask, other=0.0)
        slopes = tl.zeros([BLOCK_M], tl.float32)
        if ALIBI:
            slopes += tl.load(slopes_ptr + q_head)
        last = tl.load(tile_start + tile) + (length - q_len) + BLOCK_M  # past the last position of the tile
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(last - BLOCK_M - WINDOW + 1, 0) // ALIGN * ALIGN
        _, total, acc = _attend(
            q_tile,
            q_pos,
            slopes,
            k_cache,
            v_cache,
            table,
            base,
            head,
            begin,
            tl.minimum(last, length),
            scale,
            softcap,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_M,
            BLOCK_SIZE,
            CONTIGUOUS,
            WINDOW,
            SOFTCAP,
            ALIBI,
        )
        o = out + (token[:, None] * NUM_HEADS + q_head) * HEAD_DIM + d[None, :]
        tl.store(o, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@cache
def _arrivals(device: torch.device) -> Tensor:
    return torch.zeros(1 << 18, dtype=torch.int32, device=device)


def _decode_tiles(block_d: int, wide: bool, programs: int) -> dict[str, int]:
    """Keys that a program reads at a time, and how. Many programs: small ones, of which more fit beside each other."""
    if not wide and block_d <= 128 and programs >= PROGRAMS:
        return {"BLOCK_N": 32, "num_warps": 1, "num_stages": 3}
    return {"BLOCK_N": 32 if wide or block_d > 128 else 64, "num_warps": 4, "num_stages": 2 if wide else 3}


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DeviceMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """As the twin: q `[num_tokens, num_heads, head_dim]`, last dimension contiguous -> the same shape.

    batch_invariant: every query goes through tiles (`invariant_tiles` of all entries, num_decode 0), keys in fixed
    tiles from position 0, so its bits depend on nothing but its own history.
    """
    num_heads, (_, kv_heads, head_dim) = q.shape[1], k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    common: dict[str, Any] = {
        "NUM_HEADS": num_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": meta.block_size,
        "CONTIGUOUS": meta.contiguous,
        "WINDOW": window or 0,
        "SOFTCAP": softcap is not None,
        "ALIBI": alibi is not None,
        **launch_options(q.device),
    }
    scalars = (scale, softcap or 1.0, q.stride(0), meta.block_table.stride(0))
    slopes = q if alibi is None else alibi
    wide = q.dtype == torch.float32
    where = (meta.block_table, meta.rows, meta.seq_lens)
    if meta.num_decode:
        n, group = meta.num_decode, max(16, triton.next_power_of_2(num_heads // kv_heads))
        splits = min(max(PROGRAMS // (n * kv_heads), 1), MAX_SPLITS)
        parts = n * kv_heads * splits * group if splits > 1 else 0
        acc = torch.empty(parts * block_d, dtype=torch.float32, device=q.device)
        maxima = torch.empty(parts * 2, dtype=torch.float32, device=q.device)
        _decode[(kv_heads, n, splits)](
            q,
            out,
            k_cache,
            v_cache,
            *where,
            slopes,
            acc,
            maxima,
            _arrivals(q.device),
            *scalars,
            GROUP=group,
            SPLITS=splits,
            SPLIT_UNIT=MIN_SPLIT,
            **_decode_tiles(block_d, wide, n * kv_heads * splits),
            **common,
        )
    if meta.tile_entry is not None and meta.tile_start is not None:
        large = not wide and block_d <= 128
        block_m = INVARIANT_TILE if batch_invariant else PREFILL_TILE
        _prefill[(num_heads, len(meta.tile_entry))](
            q,
            out,
            k_cache,
            v_cache,
            *where,
            meta.query_start,
            meta.tile_entry,
            meta.tile_start,
            slopes,
            *scalars,
            BLOCK_M=block_m,
            BLOCK_N=64 if large else 32,
            ALIGN=64 if large else 32,
            num_warps=4 if batch_invariant else 8,
            num_stages=1 if wide and block_d > 64 else 2,
            **common,
        )
    return out
