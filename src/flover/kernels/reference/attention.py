"""Variable-length attention over the KV cache in pure torch: prefill chunks and decode rows in one call.

Each row attends to its own history only, read through the layout's addressing: a contiguous slab slot is a
view, a block table is a gather of whole blocks. Nothing past a row's length is ever read, so stale or
poisoned memory cannot leak into a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # query rows per tile, batch-invariant mode
SPLIT = 64  # keys per split, batch-invariant mode


@dataclass(slots=True)
class AttentionMetadata:
    """Where each packed row's queries are and where its history lies.

    query_start: `[num_rows + 1]` offsets of the rows' queries in the packed batch (cu_seqlens_q).
    seq_lens: `[num_rows]` history length after this step's tokens are stored.
    blocks: per row the int64 ids of the blocks it reads, in order; for a slab one id, its slot.
    """

    query_start: list[int]
    seq_lens: list[int]
    blocks: list[Tensor]
    block_size: int
    contiguous: bool  # slab: one block holds the whole row
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)


def gather_history(
    cache: Tensor,
    meta: AttentionMetadata,
    row: int,
    dtype: torch.dtype,
    start: int = 0,
    scratch: str | None = None,
) -> Tensor:
    """Tokens [start, seq_len) of a row in `dtype`, `[n, kv_heads, head_dim]`: a view where layout and cache allow.

    scratch: gather into the step's buffer of that name, which the next call with it overwrites; the first touch of
    fresh memory costs more than the copy.
    """
    if cache.dtype == dtype:
        return _gather(cache, meta, row, start, scratch)
    return _gather(cache.view(torch.uint8), meta, row, start, scratch).view(cache.dtype).to(dtype)  # fp8, as bytes


def _gather(cache: Tensor, meta: AttentionMetadata, row: int, start: int, scratch: str | None) -> Tensor:
    length, size = meta.seq_lens[row], meta.block_size
    if meta.contiguous:
        base = int(meta.blocks[row][0]) * size
        return cache[base + start : base + length]
    first = start // size
    blocks = meta.blocks[row][first:] if first else meta.blocks[row]
    table = cache.view(-1, size * math.prod(cache.shape[1:]))
    if scratch is None:
        gathered = table.index_select(0, blocks)
    else:
        if scratch not in meta.scratch:
            meta.scratch[scratch] = table.new_empty(max(map(len, meta.blocks)), table.shape[1])
        gathered = torch.index_select(table, 0, blocks, out=meta.scratch[scratch][: len(blocks)])
    return gathered.view(-1, *cache.shape[1:])[start - first * size : length - first * size]


def _mask(meta: AttentionMetadata, row: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """`[q_len, seq_len - start]` bool: causal and in the window. Made once a step, shared by all layers."""
    key = (row, window)
    if key not in meta.masks:
        length = meta.seq_lens[row]
        q_len = meta.query_start[row + 1] - meta.query_start[row]
        queries = torch.arange(length - q_len, length, device=device)[:, None]
        keys = torch.arange(start, length, device=device)[None, :]
        mask = keys <= queries
        if window is not None:
            mask = mask & (keys > queries - window)
        meta.masks[key] = mask
    return meta.masks[key]


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries `[num_tokens, num_heads, head_dim]` over each row's history.

    window: a query sees this many keys, itself included. softcap: scores become cap * tanh(score / cap).
    alibi: `[num_heads]` slopes; slope * key position is added to the score (ALiBi up to a constant per
    query). Query head h reads kv head h // group: the group is folded into the query axis, K and V are never
    copied.
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // kv_heads
    plain = softcap is None and alibi is None
    out: list[Tensor] = []
    q_lens = [end - begin for begin, end in pairwise(meta.query_start)]
    for row, (query, q_len, length) in enumerate(zip(q.split_with_sizes(q_lens), q_lens, meta.seq_lens)):
        if q_len == 0:
            continue
        start = 0 if window is None else max(0, length - q_len - window + 1)
        k = gather_history(k_cache, meta, row, q.dtype, start, "k").transpose(0, 1)  # [kv_heads, keys, head_dim]
        v = gather_history(v_cache, meta, row, q.dtype, start, "v").transpose(0, 1)
        if plain and q_len == 1:  # decode: every call per row and layer counts
            query = query.view(1, kv_heads, group, head_dim)
            o = F.scaled_dot_product_attention(query, k[None], v[None], scale=scale)
            out.append(o.reshape(1, -1, head_dim))
            continue
        # [kv_heads, group * q_len, head_dim]
        query = query.view(q_len, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        query = query.reshape(kv_heads, group * q_len, head_dim)
        whole = q_len == length and window is None  # a prompt in one piece
        if plain and whole and group == 1:
            o = F.scaled_dot_product_attention(query[None], k[None], v[None], is_causal=True, scale=scale)[0]
        elif plain:
            mask = _mask(meta, row, start, window, q.device).repeat(group, 1)
            o = F.scaled_dot_product_attention(query[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = (query @ k.transpose(1, 2)).to(wide) * scale  # [kv_heads, group * q_len, keys]
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.view(kv_heads, group, q_len, -1)
            if alibi is not None:
                keys = torch.arange(start, length, device=q.device)
                scores = scores + alibi.to(wide).view(kv_heads, group, 1, 1) * keys
            scores = scores.masked_fill(~_mask(meta, row, start, window, q.device), float("-inf"))
            probs = scores.softmax(-1).to(q.dtype)
            o = probs.view(kv_heads, group * q_len, -1) @ v
        o = o.reshape(kv_heads, group, q_len, head_dim).permute(2, 0, 1, 3)
        out.append(o.reshape(q_len, -1, head_dim))
    return torch.cat(out)
