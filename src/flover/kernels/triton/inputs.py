"""The first kernels of a step: block-table edits, then per token its id and the cache slot it is stored in.

Everything they read comes from one int32 buffer that the host fills and sends with a single copy, and from the tokens
that the sampler left on the device: so a step needs no answer from the step before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["edits"])  # a view of the staging buffer
def _edit_tables(edits, block_table, stride, COPY: tl.constexpr, PDL: tl.constexpr):
    grid_launch(PDL)
    grid_wait(PDL)
    edit = edits + tl.program_id(0) * 4
    row, first, count, start = tl.load(edit), tl.load(edit + 1), tl.load(edit + 2), tl.load(edit + 3)
    target = block_table + row.to(tl.int64) * stride + first
    for at in range(0, count, COPY):
        i = at + tl.arange(0, COPY)
        tl.store(target + i, tl.load(edits + start + i, mask=i < count), mask=i < count)


def edit_tables(edits: Tensor, num_edits: int, block_table: Tensor) -> None:
    """Write block ids into `block_table` `[rows, blocks]` int32.

    edits: int32, first `[num_edits, 4]` (row, first entry, count, offset in `edits` of the ids), then the ids.
    """
    _edit_tables[(num_edits,)](
        edits, block_table, block_table.stride(0), COPY=64, num_warps=1, **launch_options(edits.device)
    )


@triton.jit(
    do_not_specialize=["num_tokens", "stride"],  # each step's own, as is the place of its parts in the staging buffer
    do_not_specialize_on_alignment=["ids", "positions", "rows"],
)
def _token_inputs(
    ids,
    positions,
    rows,
    last_token,
    block_table,
    input_ids,
    slots,
    num_tokens,
    stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    row = tl.load(rows + t, mask=inside, other=-1)
    token = tl.load(ids + t, mask=inside, other=0)
    position = tl.load(positions + t, mask=inside, other=0)
    drawn = tl.load(last_token + row, mask=inside & (token < 0) & (row >= 0), other=0)
    tl.store(input_ids + t, tl.where(token < 0, drawn, token.to(tl.int64)), mask=inside)
    stored = inside & (row >= 0)
    block = tl.load(block_table + row.to(tl.int64) * stride + position // BLOCK_SIZE, mask=stored, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots + t, tl.where(stored, slot, -1), mask=inside)


def token_inputs(
    ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    last_token: Tensor,
    block_table: Tensor,
    block_size: int,
    input_ids: Tensor,
    slots: Tensor,
) -> None:
    """Fill `input_ids` and `slots`, both `[num_tokens]` int64.

    Args:
        ids: [num_tokens] int32, -1 where it is the token that the row drew last.
        positions: [num_tokens] int32.
        rows: [num_tokens] int32, -1 for a token that is not stored (padding, a frozen row): its slot is -1.
        last_token: [rows] int64. block_table: [rows, blocks] int32.
    """
    n = ids.shape[0]
    _token_inputs[(triton.cdiv(n, 256),)](
        ids,
        positions,
        rows,
        last_token,
        block_table,
        input_ids,
        slots,
        n,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=256,
        **launch_options(ids.device),
    )
