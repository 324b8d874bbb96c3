"""Staging: what a step's kernels read, packed by the host into one int32 buffer and sent with one copy.

A ring of pinned buffers, each reused only after the event behind its copy; on the device one buffer whose address never
changes, so that CUDA graphs can hold views of it. The copy runs on the stream of the kernels, so it waits for those of
the step before that still read the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flover.engine.cuda_graph import Shape

Ints = npt.NDArray[np.int32]

# name -> what fills the rest of a part in a step that was padded to a bucket
TOKEN_PARTS = {"ids": 0, "positions": 0, "token_rows": -1, "prompt_lens": 0}
ENTRY_PARTS = {"entry_rows": 0, "seq_lens": 0, "sample_index": 0, "sample_rows": 0}  # the last: the scratch row
TILE_PARTS = {"tile_entry": -1, "tile_start": 0}
SHARE_PARTS = {"share_entry": -1, "share_number": 0}
ALIGN = 4  # ints


@lru_cache(maxsize=1024)
def sections(shape: Shape, num_shares: int) -> dict[str, slice]:
    """Where each part of a step of that shape lies, at multiples of 16 bytes: kernels are compiled by alignment."""
    sizes = (
        [(name, shape.tokens) for name in TOKEN_PARTS]
        + [(name, shape.entries) for name in ENTRY_PARTS]
        + [("query_start", shape.entries + 1)]
        + [(name, shape.tiles) for name in TILE_PARTS]
        + [("share_keys", 1)]
        + [(name, num_shares) for name in SHARE_PARTS]
    )
    starts = np.cumsum([0] + [-(-size // ALIGN) * ALIGN for _, size in sizes]).tolist()
    return {name: slice(start, start + size) for (name, size), start in zip(sizes, starts)}


class Staging:
    """num_buffers: steps that may be in flight, and one more. scratch_row: the sampler's, where padding draws."""

    def __init__(self, capacity: int, num_buffers: int, scratch_row: int, device: torch.device) -> None:
        self._padding = (
            TOKEN_PARTS | ENTRY_PARTS | TILE_PARTS | SHARE_PARTS | {"share_keys": 1, "sample_rows": scratch_row}
        )
        self.device_buffer = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [torch.zeros(capacity, dtype=torch.int32, pin_memory=True) for _ in range(num_buffers)]
        self._events = [torch.cuda.Event() for _ in range(num_buffers)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def send(self, parts: Mapping[str, Ints], places: Mapping[str, slice], edits: list[tuple[int, int, Any]]) -> Tensor:
        """Pack and send, padding parts that are short or missing; -> the device view of the edits, may be empty."""
        turn = self._turn = (self._turn + 1) % len(self._pinned)
        self._events[turn].synchronize()
        host = self._pinned[turn].numpy()
        for name, place in places.items():
            values = parts.get(name, ())
            end = place.start + len(values)
            host[place.start : end] = values
            if end < place.stop:
                host[end : place.stop] = self._padding.get(name, values[-1:])  # query_start: no tokens
        start = at = -(-max(place.stop for place in places.values()) // ALIGN) * ALIGN
        if edits:
            at = self._pack_edits(host, start, edits)
        self.device_buffer[:at].copy_(self._pinned[turn][:at], non_blocking=True)
        self._events[turn].record()
        return self.device_buffer[start:at]

    def _pack_edits(self, host: Ints, start: int, edits: list[tuple[int, int, Any]]) -> int:
        """Block-table edits, as `kernels.triton.inputs.edit_tables` reads them; -> where they end."""
        at = 4 * len(edits)
        for i, (row, first, ids) in enumerate(edits):
            host[start + 4 * i : start + 4 * i + 4] = row, first, len(ids), at
            host[start + at : start + at + len(ids)] = ids
            at += len(ids)
        return start + at
