"""Attention over the KV cache on a GPU: split-KV decode, and prefill in query tiles; one launch each.

This is the host side: metadata, tiles and launches; the kernels are in attention_kernels.py. Invariants: grids depend
on shapes alone, never on lengths, so that a CUDA graph can hold a launch (programs without work end at once); in decode
one load of K and V serves all query heads of its group. Sources: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et
al. 2023), paged attention (Kwon et al. 2023). The twin is kernels/reference/attention.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from flover.kernels.triton.attention_kernels import decode, prefill
from flover.kernels.triton.common import arrivals, assert_heads_side_by_side, launch_options
from flover.kernels.triton.rotary import rotary_store

PREFILL_ROWS = 128  # of a program's tile: a query and a head each
INVARIANT_TILE = 16  # queries of one program, batch-invariant: tiles begin at multiples of it in absolute positions
PROGRAMS = 528  # of decode, side by side: four on each multiprocessor of an H100 or H200
FILL = 845  # programs among which many entries are divided: four fifths of the small ones that lie side by side
MAX_SHARES = 32  # of one entry, of few entries in the mean
SHARE_UNIT = 64  # keys that are worth a program of their own

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class DeviceMetadata:
    """Where queries and histories lie, on the device; addresses are static, so that a graph can hold them.

    block_table: [max_rows, max_blocks] int32. rows: [num_entries] int32, the table row of each entry.
    seq_lens: [num_entries] int32, history after this step's tokens are stored; 0: padding, computes nothing.
    query_start: [num_entries + 1] int32, offsets of the entries' queries in the packed batch.
    num_decode: entries [0, num_decode) have one query each, at the packed index of the entry.
    share_keys: [1] int32, share_entry, share_number: [num_shares] int32, which keys each decode program reads, see
        `decode_shares`.
    tile_entry, tile_start: [num_tiles] int32, of each prefill tile its entry and first query, see `prefill_tiles`.
    tile_queries: of a prefill tile, at most.
    """

    block_table: Tensor
    rows: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode: int
    share_keys: Tensor
    share_entry: Tensor
    share_number: Tensor
    tile_entry: Tensor | None
    tile_start: Tensor | None
    tile_queries: int
    block_size: int
    contiguous: bool


def tile_queries(num_heads: int, kv_heads: int, batch_invariant: bool = False) -> int:
    """Queries of a prefill tile, which has several query heads of one kv head of each: they read the same K and V."""
    return INVARIANT_TILE if batch_invariant else PREFILL_ROWS // math.gcd(num_heads // kv_heads, 8)


def _pieces(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Entry 0 in so many pieces, then entry 1, ...: of each piece its entry, and which of the entry's it is."""
    entry = np.repeat(np.arange(len(counts)), counts)
    return entry, np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)


def prefill_tiles(q_lens: npt.ArrayLike, first_entry: int, queries: int) -> tuple[Ints, Ints]:
    """Tiles of entries first_entry, ..., of so many queries at most: (entry, index of the first query within it).

    Those with most keys come first.
    """
    entry, number = _pieces(-(-np.asarray(q_lens, dtype=np.int64) // queries))
    start = number * queries
    order = np.argsort(-start, kind="stable")
    return (entry + first_entry)[order].astype(np.int32), start[order].astype(np.int32)


def invariant_tiles(q_lens: npt.ArrayLike, seq_lens: npt.ArrayLike) -> tuple[Ints, Ints]:
    """Tiles of all entries for the batch-invariant mode; a start is negative where a tile begins before the chunk."""
    lens = np.asarray(q_lens, dtype=np.int64)
    first = np.asarray(seq_lens, dtype=np.int64) - lens  # position of the first query
    low = first // INVARIANT_TILE
    entry, number = _pieces((first + lens - 1) // INVARIANT_TILE - low + 1)
    return entry.astype(np.int32), ((low[entry] + number) * INVARIANT_TILE - first[entry]).astype(np.int32)


def _many(num_decode: int, kv_heads: int) -> bool:
    """Whether the entries alone fill the GPU."""
    return num_decode * kv_heads >= PROGRAMS


def num_shares(num_decode: int, kv_heads: int) -> int:
    """Shares that a decode launch of so many entries has room for: what fills the GPU, and some for long entries."""
    if _many(num_decode, kv_heads):
        return num_decode + -(-FILL // kv_heads)
    return max(min(PROGRAMS // kv_heads, MAX_SHARES * num_decode), num_decode + num_decode // 4)


def decode_shares(seq_lens: npt.ArrayLike, kv_heads: int) -> tuple[Ints, Ints, Ints]:
    """Divide the keys of decode entries so that no program has much more than its part of them all.

    Of few entries a share is the smallest multiple of SHARE_UNIT with which there are at most `num_shares`. Of many it
    is a FILL-th of all keys, or a quarter more than the mean entry has, so that rows of much the same length stay
    whole. Shares of the longest entries come first: programs start in this order, and small ones fill what large ones
    leave.

    Returns: keys of a share at most, `[1]`; of each share its entry, and which of the entry's shares it is.
    """
    lens = np.asarray(seq_lens, dtype=np.int64)
    longest = int(lens.max(initial=1))
    if _many(len(lens), kv_heads):
        part = max(lens.sum() * max(kv_heads / FILL, 1.25 / len(lens)), longest / MAX_SHARES)
        keys = math.ceil(part / SHARE_UNIT) * SHARE_UNIT
    else:
        room, sizes = num_shares(len(lens), kv_heads), range(SHARE_UNIT, longest + SHARE_UNIT + 1, SHARE_UNIT)
        keys = sizes[bisect_left(sizes, True, key=lambda keys: (-(-lens // keys)).sum() <= room)]
    order = np.argsort(-lens, kind="stable")
    entry, number = _pieces(-(-lens[order] // keys))
    return np.array([keys], dtype=np.int32), order[entry].astype(np.int32), number.astype(np.int32)


def decode_options(block_d: int, wide: bool, fp8: bool, programs: int, contiguous: bool) -> dict[str, int]:
    """Keys that a decode program reads at a time, and how. Many programs: small ones, more of which fit side by side.

    block_d: head size, padded. wide: fp32 queries. fp8: the cache is. programs: one for each entry and kv head.
    contiguous: a slab, where every stage holds keys; with blocks one looks up the table. So large programs have one
    less, and as many of them fit.
    """
    stages = 2 if wide or contiguous else 3
    if programs <= 16 and not wide:  # a row or two: there is room for large ones
        return {"BLOCK_N": 64, "num_warps": 8, "num_stages": stages}
    if wide or block_d > 128:
        return {"BLOCK_N": 32, "num_warps": 4, "num_stages": stages}
    if fp8:
        many = {"num_warps": 2, "maxnreg": 168}  # six to a multiprocessor
        return {"BLOCK_N": 64, "num_stages": 3, **(many if programs >= PROGRAMS else {"num_warps": 4})}
    if programs >= PROGRAMS:
        return {"BLOCK_N": 32, "num_warps": 1, "num_stages": 3}
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": stages}


def prefill_options(block_d: int, wide: bool, batch_invariant: bool, contiguous: bool) -> dict[str, int]:
    """The same of a prefill program, and the rows of its tile."""
    large = not wide and block_d <= 128
    rows = INVARIANT_TILE if batch_invariant else PREFILL_ROWS
    common = {"BLOCK_M": rows, "BLOCK_N": 64 if large else 32, "num_warps": 4 if batch_invariant else 8}
    if large and not batch_invariant:
        # two programs to a multiprocessor: one computes, one loads
        return {**common, "num_stages": 2 if contiguous else 3, "maxnreg": 128}
    return {**common, "num_stages": 1 if wide and block_d > 64 else 2}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    meta: DeviceMetadata,
    *,
    rotary: tuple[Tensor, Tensor, bool] | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """As the twin: q, k, v `[num_tokens, heads, head_dim]`, heads side by side -> the shape of q, which is overwritten.

    Decode rotates and stores as it attends; for prefill this is done before.
    batch_invariant: every query goes through tiles (`invariant_tiles` of all entries, num_decode 0), keys in fixed
    tiles from position 0, so its bits depend on nothing but its own history.
    """
    num_heads, (_, kv_heads, head_dim) = q.shape[1], k_cache.shape
    assert_heads_side_by_side(q, k, v)
    assert all(t.is_contiguous() for t in (k_cache, v_cache, slots, meta.block_table))
    assert k_cache.dtype == v_cache.dtype
    cos, sin, interleaved = rotary or (None, None, False)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared: dict[str, Any] = {  # what both kernels take, by name
        "q": q,
        "out": out,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": meta.block_table,
        "rows": meta.rows,
        "seq_lens": meta.seq_lens,
        "slopes_ptr": q if alibi is None else alibi,
        "scale": scale,
        "softcap": softcap or 1.0,
        "stride_q": q.stride(0),
        "stride_table": meta.block_table.stride(0),
        "NUM_HEADS": num_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(32 if k_cache.element_size() == 1 else 16, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": meta.block_size,
        "CONTIGUOUS": meta.contiguous,
        "WINDOW": window or 0,
        "SOFTCAP": softcap is not None,
        "ALIBI": alibi is not None,
        **launch_options(q.device),
    }
    if meta.num_decode:
        _launch_decode(shared, k, v, slots, meta, cos, sin, interleaved)
    if meta.tile_entry is not None:
        rotary_store(q, k, v, cos, sin, k_cache, v_cache, slots, interleaved=interleaved)  # decode's again: no harm
        _launch_prefill(shared, meta, batch_invariant)
    return out


def _launch_decode(
    shared: dict[str, Any],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    meta: DeviceMetadata,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    q, k_cache, n = shared["q"], shared["k_cache"], meta.num_decode
    num_heads, (_, kv_heads, head_dim) = q.shape[1], k_cache.shape
    shares = len(meta.share_entry)
    wide, fp8 = q.dtype == torch.float32, k_cache.element_size() == 1
    decode[(kv_heads, shares)](
        **shared,
        k=k,
        v=v,
        cos=q if cos is None else cos,
        sin=q if sin is None else sin,
        slots=slots,
        share_keys=meta.share_keys,
        share_entry=meta.share_entry,
        share_number=meta.share_number,
        part_acc=torch.empty(num_heads * shares * head_dim, dtype=torch.float32, device=q.device),
        part_m=torch.empty(num_heads * shares * 2, dtype=torch.float32, device=q.device),
        arrived=arrivals(q.device, n * kv_heads),
        stride_k=k.stride(0),
        stride_v=v.stride(0),
        PAIRS=0 if cos is None else cos.shape[-1],
        INTERLEAVED=interleaved,
        GROUP=triton.next_power_of_2(num_heads // kv_heads),
        SHARE_UNIT=SHARE_UNIT,
        EVEN=not _many(n, kv_heads),  # of many, small shares fill what large ones leave
        **decode_options(shared["BLOCK_D"], wide, fp8, n * kv_heads, meta.contiguous),
    )


def _launch_prefill(shared: dict[str, Any], meta: DeviceMetadata, batch_invariant: bool) -> None:
    assert meta.tile_entry is not None
    pack = 1 if batch_invariant else PREFILL_ROWS // meta.tile_queries
    wide = shared["q"].dtype == torch.float32
    prefill[(shared["NUM_HEADS"] // pack, len(meta.tile_entry))](
        **shared,
        query_start=meta.query_start,
        tile_entry=meta.tile_entry,
        tile_start=meta.tile_start,
        PACK=pack,
        **prefill_options(shared["BLOCK_D"], wide, batch_invariant, meta.contiguous),
    )
