"""The tensors of the KV cache: per layer K and V `[(num_blocks + 1) * block_size, kv_heads, head_dim]`.

One store serves both layouts (a slab slot is a large block). The last block is scratch, where rows that compute without
counting write. Addresses never change: on a CPU each tensor lies in an anonymous mapping whose pages the system
supplies when they are first written; a release hands the pages of the tail back (MADV_DONTNEED) while the range stays
reserved; taking them again is writing to them.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flover.kernels.dispatch import load_backend


class KVStorage:
    """K and V of every layer.

    Args:
        num_layers, num_blocks, block_size, kv_heads, head_dim: the shape.
        dtype, device: of the tensors. backend: `kernels.dispatch`.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str = "torch",
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._ops = load_backend(backend)
        self.scratch = num_blocks * block_size  # flat index of the scratch token
        self._maps: list[mmap.mmap] = []
        self._reserved = num_blocks
        shape = (self.scratch + block_size, kv_heads, head_dim)
        self._token_bytes = kv_heads * head_dim * dtype.itemsize
        both = [self._allocate(shape, dtype, device) for _ in range(2 * num_layers)]
        self.k, self.v = both[:num_layers], both[num_layers:]

    def _allocate(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # private: the pages of a shared mapping would outlive MADV_DONTNEED
        region = mmap.mmap(-1, shape[0] * self._token_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        self._maps.append(region)
        return torch.frombuffer(region, dtype=dtype).view(shape)

    def apply(self, moves: Sequence[tuple[int, int, int]], freed: Sequence[int], reserved_blocks: int) -> None:
        """Poison what was freed (debug), copy live prefixes, give the tail back or take it again.

        The source of a move is freed too, and is poisoned after the copy; its destination may have been freed before.
        """
        caches = self.k + self.v
        sources = {src for src, _, _ in moves}
        before = [block for block in freed if block not in sources]
        if before:
            self._ops.poison_blocks(caches, before, self.block_size)
        if moves:
            self._ops.copy_blocks(caches, moves, self.block_size)
        after = [block for block in freed if block in sources]
        if after:
            self._ops.poison_blocks(caches, after, self.block_size)
        if reserved_blocks < self._reserved:
            self._release(reserved_blocks)
        self._reserved = reserved_blocks

    def _release(self, reserved_blocks: int) -> None:
        page = mmap.PAGESIZE
        start = -(-reserved_blocks * self.block_size * self._token_bytes // page) * page
        end = self._reserved * self.block_size * self._token_bytes // page * page
        if start < end:
            for region in self._maps:
                region.madvise(mmap.MADV_DONTNEED, start, end - start)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cache that the system backs with memory now (Linux, CPU; elsewhere the whole cache)."""
        caches = self.k + self.v
        if not self._maps or not Path("/proc/self/pagemap").exists():
            return sum(cache.numel() * cache.element_size() for cache in caches)
        return sum(_resident_pages(c.data_ptr(), c.numel() * c.element_size()) for c in caches) * mmap.PAGESIZE


def _resident_pages(address: int, size: int) -> int:
    """Pages in `[address, address + size)` that are present or swapped out (bits 63 and 62 of /proc/self/pagemap)."""
    first, last = address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read((last - first) * 8), dtype=np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(62)))
