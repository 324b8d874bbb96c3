"""Copies inside the KV cache: the paper's buffer reordering, and copy-on-write of shared blocks, in one launch.

All caches of a model have one shape, so a kernel reaches each as an offset from the first. A program copies a piece of
one move in one cache; sources are never destinations, so the order does not matter. The twin is
kernels/reference/kv_cache.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.reference.kv_cache import poison_blocks
from flover.kernels.triton.common import grid_launch, grid_wait, launch_options

__all__ = ["copy_blocks", "poison_blocks"]

BLOCK = 4096  # elements that a program copies at a time


@triton.jit
def _copy(
    base,
    offsets,  # [num_caches] int64, elements from `base`
    moves,  # [num_moves, 3] int64: source, destination, elements
    ALIGNED: tl.constexpr,  # divides every offset and count, and makes at most 16 bytes
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    cache = base + tl.multiple_of(tl.load(offsets + tl.program_id(1)), ALIGNED)
    move = moves + tl.program_id(2) * 3
    src, dst = tl.multiple_of(tl.load(move), ALIGNED), tl.multiple_of(tl.load(move + 1), ALIGNED)
    count = tl.multiple_of(tl.load(move + 2), ALIGNED)  # or the mask would keep loads narrow
    i = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + i
        tl.store(cache + dst + at, tl.load(cache + src + at, mask=at < count), mask=at < count)


def copy_blocks(caches: Sequence[Tensor], moves: Sequence[tuple[int, int, int]], block_size: int) -> None:
    """For each `(src, dst, num_tokens)` copy the live prefix of block src to block dst, in every cache given."""
    if not moves:
        return
    base, device = caches[0], caches[0].device
    if base.element_size() == 1:  # fp8: a copy needs no arithmetic on it, and its dtype some
        base = base.view(torch.uint8)
    width = base[0].numel()
    rows = [(src * block_size * width, dst * block_size * width, n * width) for src, dst, n in moves]
    offsets = [(cache.data_ptr() - base.data_ptr()) // base.element_size() for cache in caches]
    aligned = math.gcd(16 // base.element_size(), width, *offsets)  # the same for all moves: compiled once
    packed = torch.tensor([*offsets, *(value for row in rows for value in row)], dtype=torch.int64)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = min(-(-max(row[2] for row in rows) // BLOCK), 64)
    _copy[(pieces, len(caches), len(moves))](
        base, packed, packed[len(caches) :], ALIGNED=aligned, BLOCK=BLOCK, num_warps=8, **launch_options(device)
    )
