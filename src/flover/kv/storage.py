"""The tensors of the KV cache: per layer K and V `[(num_blocks + 1) * block_size, kv_heads, head_dim]`.

One store serves both layouts (a slab slot is a large block). The last block is scratch, where rows that compute without
counting write. Addresses never change: on a CPU each tensor lies in an anonymous mapping whose pages the system
supplies when they are first written; a release hands the pages of the tail back (MADV_DONTNEED) while the range stays
reserved; taking them again is writing to them. On a GPU an elastic store reserves addresses for all blocks and maps
memory behind those that are reserved (`virtual_memory`), so captured graphs stay valid.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from flover.kernels.dispatch import load_backend
from flover.kv.virtual_memory import VirtualRange, load_driver

logger = logging.getLogger("flover")


class KVStorage:
    """K and V of every layer.

    Args:
        num_layers, num_blocks, block_size, kv_heads, head_dim: the shape.
        dtype, device: of the tensors. backend: `kernels.dispatch`.
        elastic: on a GPU, back only the reserved blocks with memory: before the first `apply` the first block, and
            scratch always. Without it, or where CUDA's virtual memory cannot be used, everything stays backed.
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
        elastic: bool = False,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._ops = load_backend(backend)
        self.scratch = num_blocks * block_size  # flat index of the scratch token
        self._maps: list[mmap.mmap] = []
        self._ranges: list[tuple[VirtualRange, Tensor]] = []  # and all its bytes
        self._reserved = num_blocks
        self._device = device
        shape = (self.scratch + block_size, kv_heads, head_dim)
        self._token_bytes = kv_heads * head_dim * dtype.itemsize
        both: list[Tensor] = []
        if elastic and device.type != "cpu":
            try:
                both = self._reserve(2 * num_layers, shape, dtype)
            except RuntimeError as error:
                logger.warning("the KV cache keeps all its memory, and gives none back between requests: %s", error)
                self._ranges.clear()
        both = both or [self._allocate(shape, dtype, device) for _ in range(2 * num_layers)]
        self.k, self.v = both[:num_layers], both[num_layers:]

    def _reserve(self, num_caches: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
        """Tensors with an address for every block, and memory for the first and for scratch."""
        driver, index = load_driver(), self._device.index
        size = shape[0] * self._token_bytes
        for _ in range(num_caches):
            index = torch.cuda.current_device() if index is None else index
            memory = VirtualRange(size, self.scratch * self._token_bytes, driver, index)
            fresh = memory.resize(self.block_size * self._token_bytes)  # torch looks at the first address
            data = _bytes_of(memory, self._device)
            self._ranges.append((memory, data))
            for start, end in (fresh, (memory.tail, memory.size)):
                data[start:end].zero_()
        self._reserved = 1
        return [data[:size].view(dtype).view(shape) for _, data in self._ranges]

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
        if reserved_blocks > self._reserved:
            self._take(reserved_blocks)
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

    def _take(self, reserved_blocks: int) -> None:
        """Back more blocks with memory, which reads as zero; elsewhere than on a GPU the system does so by itself."""
        for retry in (True, False):
            try:
                for memory, data in self._ranges:
                    start, end = memory.resize(reserved_blocks * self.block_size * self._token_bytes)
                    data[start:end].zero_()
                return
            except RuntimeError as error:
                if not retry:
                    self._release(self._reserved)  # what some of the caches have got
                    raise RuntimeError(f"no memory for {reserved_blocks} slots of the KV cache: {error}") from None
                torch.cuda.empty_cache()  # it may be what PyTorch keeps for later

    def _release(self, reserved_blocks: int) -> None:
        if self._ranges:
            _wait_for(self._device)  # earlier steps, and this one's moves, may read what goes
            for memory, _ in self._ranges:
                memory.resize(max(reserved_blocks, 1) * self.block_size * self._token_bytes)
            return
        page = mmap.PAGESIZE
        start = -(-reserved_blocks * self.block_size * self._token_bytes // page) * page
        end = self._reserved * self.block_size * self._token_bytes // page * page
        if start < end:
            for region in self._maps:
                region.madvise(mmap.MADV_DONTNEED, start, end - start)


def _bytes_of(memory: VirtualRange, device: torch.device) -> Tensor:
    """All of a range as a uint8 tensor, which keeps it alive."""
    return torch.as_tensor(memory, device=device)


def _wait_for(device: torch.device) -> None:
    """Until all that is enqueued on the current stream is done. A release is seldom, so it may wait for a step."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    event.synchronize()
