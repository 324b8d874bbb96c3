"""Writes to the KV cache: new tokens, block copies, poison.

One layout, `[num_blocks * block_size, kv_heads, head_dim]`. A slab slot is a block of `slot_tokens`; so
compaction (the paper's buffer reordering) and copy-on-write of a paged block are the same copy of a live
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatter K/V `[num_tokens, kv_heads, head_dim]` to indices `slot_mapping` `[num_tokens]`, int64."""
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


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
        cache.view(-1, block_size, *cache.shape[1:]).index_fill_(0, ids, float("nan"))
