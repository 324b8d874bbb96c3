"""Writes to the KV cache: new tokens, block copies, poison.

One layout, `[num_blocks * block_size, kv_heads, head_dim]`. A slab slot is a block of `slot_tokens`; so
compaction (the paper's buffer reordering) and copy-on-write of a paged block are the same copy of a live
prefix. An fp8 cache (e4m3fn, scale 1) saturates at +-448 and keeps NaN; it is written as bytes, because torch lacks
index_copy and index_fill for its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_NAN = 0x7F


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a cache of `dtype` holds it; some versions of torch make NaN of what fp8 cannot hold, hence the clamp."""
    if dtype != FP8:
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatter K/V `[num_tokens, kv_heads, head_dim]` to indices `slot_mapping` `[num_tokens]`, int64."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        converted = to_cache(new, cache.dtype)
        if cache.dtype == FP8:
            converted, cache = converted.view(torch.uint8), cache.view(torch.uint8)
        cache.index_copy_(0, slot_mapping, converted)


def copy_blocks(caches: Sequence[Tensor], moves: Sequence[tuple[int, int, int]], block_size: int) -> None:
    """For each `(src, dst, num_tokens)` copy the live prefix of block src to block dst, in every cache given.

    Sources are never destinations of the same call, so the order of the copies does not matter.
    """
    for cache in caches:
        for src, dst, num_tokens in moves:
            s, d = src * block_size, dst * block_size
            cache[d : d + num_tokens].copy_(cache[s : s + num_tokens])


def poison_blocks(caches: Sequence[Tensor], block_ids: Sequence[int], block_size: int) -> None:
    """Fill freed blocks with NaN, so that a stale read cannot pass unseen (debug mode)."""
    ids = torch.tensor(block_ids, device=caches[0].device)
    for cache in caches:
        blocks = cache.view(-1, block_size, *cache.shape[1:])
        if cache.dtype == FP8:
            blocks.view(torch.uint8).index_fill_(0, ids, FP8_NAN)
        else:
            blocks.index_fill_(0, ids, float("nan"))
