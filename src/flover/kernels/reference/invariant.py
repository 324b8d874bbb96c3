"""Batch-invariant twins: every product has a fixed shape, so a token's bits do not depend on its company.

Linear layers run in row tiles padded to `ROW_TILE`; attention runs in query tiles aligned to absolute
positions and in key splits of a fixed size, merged in order (online softmax). A masked key contributes
exactly zero, so a longer or shorter list of splits, a chunk boundary, or a neighbour cannot change a bit. The
price is padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flover.kernels.reference.attention import SPLIT, TILE, AttentionMetadata, gather_history

ROW_TILE = 16
MAP_TILE = 16384  # elements; below torch's grain size (32768), so that a piece is never split between threads


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for x `[num_tokens, in]`, always as products of `[ROW_TILE, in]`."""
    num_tokens = x.shape[0]
    if spare := -x.shape[1] % 4:  # MKL treats rows differently by place if they are not whole vectors
        x, weight = F.pad(x, (0, spare)), F.pad(weight, (0, spare))
    padded = F.pad(x, (0, 0, 0, -num_tokens % ROW_TILE))
    tiles = [F.linear(tile, weight, bias) for tile in torch.split(padded, ROW_TILE)]
    return torch.cat(tiles)[:num_tokens]


def tiled_map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` for an element-wise function, the same bits wherever an element lies.

    torch's CPU kernels evaluate whole vectors with one routine and the rest of a buffer (or of a thread's
    share of it) with another, which differs in the last bit for silu, gelu and sigmoid. Pieces made of whole
    vectors, too small to be shared between threads, have no rest.
    """
    if x.device.type != "cpu":
        return function(x)
    flat = x.flatten()
    pieces = torch.split(F.pad(flat, (0, -flat.numel() % 64)), MAP_TILE)
    return torch.cat([function(piece) for piece in pieces])[: flat.numel()].view(x.shape)


def invariant_attention(
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
    """As `attention.attention`, bit-equal for a token whatever shares its batch or its chunk."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // kv_heads
    out = torch.empty_like(q)
    for row, length in enumerate(meta.seq_lens):
        begin, end = meta.query_start[row], meta.query_start[row + 1]
        first = length - (end - begin)  # position of the row's first query
        if begin == end:
            continue
        spare = (0, 0, 0, 0, 0, -length % SPLIT)
        keys = F.pad(gather_history(k_cache, meta, row, q.dtype), spare).transpose(0, 1)
        values = F.pad(gather_history(v_cache, meta, row, q.dtype), spare).transpose(0, 1)
        for tile in range(first // TILE, (length - 1) // TILE + 1):
            lo, hi = max(first, tile * TILE), min(length, (tile + 1) * TILE)
            query = q.new_zeros(TILE, kv_heads, group, head_dim)
            source = slice(begin + lo - first, begin + hi - first)
            query[lo - tile * TILE : hi - tile * TILE] = q[source].view(-1, kv_heads, group, head_dim)
            o = _tile(query, keys, values, tile * TILE, scale, window, softcap, alibi)
            out[source] = o[lo - tile * TILE : hi - tile * TILE].reshape(hi - lo, -1, head_dim)
    return out


def _tile(
    query: Tensor,  # [TILE, kv_heads, group, head_dim]
    keys: Tensor,  # [kv_heads, n * SPLIT, head_dim], zero past the row's length
    values: Tensor,
    position: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi: Tensor | None,
) -> Tensor:
    kv_heads, group, head_dim = query.shape[1:]
    acc_dtype = torch.promote_types(query.dtype, torch.float32)
    flat = query.permute(1, 2, 0, 3).reshape(kv_heads, group * TILE, head_dim)
    best = torch.full((kv_heads, group, TILE, 1), float("-inf"), dtype=acc_dtype, device=query.device)
    total = torch.zeros_like(best)
    acc = torch.zeros(kv_heads, group, TILE, head_dim, dtype=acc_dtype, device=query.device)
    queries = torch.arange(position, position + TILE, device=query.device)[:, None]
    last = min(keys.shape[1], position + TILE)
    for start in range(0, last, SPLIT):
        index = torch.arange(start, start + SPLIT, device=query.device)[None, :]
        visible = index <= queries
        if window is not None:
            visible = visible & (index > queries - window)
        k, v = keys[:, start : start + SPLIT], values[:, start : start + SPLIT]
        scores = (flat @ k.transpose(1, 2)).to(acc_dtype) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(kv_heads, group, TILE, SPLIT)
        if alibi is not None:
            scores = scores + alibi.to(acc_dtype).view(kv_heads, group, 1, 1) * index
        scores = scores.masked_fill(~visible, float("-inf"))
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        safe = new_best.masked_fill(new_best == float("-inf"), 0.0)  # nothing visible yet: 0, not NaN
        probs = torch.exp(scores - safe)
        decay = torch.exp(best - safe)
        total = total * decay + probs.sum(-1, keepdim=True)
        product = probs.to(query.dtype).view(kv_heads, group * TILE, SPLIT) @ v
        acc = acc * decay + product.view(kv_heads, group, TILE, head_dim).to(acc_dtype)
        best = new_best
    out = (acc / total).to(query.dtype)  # padding queries see at least key 0..position
    return out.permute(2, 0, 1, 3)
