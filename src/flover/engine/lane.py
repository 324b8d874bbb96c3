"""A lane: one stream on which steps are computed up to their logits, with its own staging, buffers and graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flover.engine.batch import IntArray
from flover.engine.cuda_graph import Shape, StepGraphs, plain_shape
from flover.engine.runner import Batch
from flover.engine.staging import Staging, sections
from flover.kernels.triton.attention import (
    FILL,
    DeviceMetadata,
    decode_shares,
    invariant_tiles,
    num_shares,
    prefill_tiles,
    tile_queries,
)
from flover.kernels.triton.inputs import edit_tables, token_inputs
from flover.layers.attention import ForwardContext
from flover.layers.sampler import SamplerOutput

if TYPE_CHECKING:
    from flover.engine.gpu_runner import GpuRunner

RING = 3  # overlap depth 1: a step in flight, one being submitted, and one whose buffers are still read


class Staged(NamedTuple):
    """A batch whose inputs are on their way to the device."""

    shape: Shape
    captured: bool  # a shape that graphs are made for
    begins: IntArray  # first token of each entry of the batch
    entries: IntArray  # place of each among the rows of the logits


class Lane:
    """A stream of a runner. What steps on two lanes write must not overlap: rows, slots, tables."""

    def __init__(self, runner: GpuRunner, max_batched_tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
        self._runner, self.sampler = runner, runner.sampler
        self.batch_invariant, self.max_rows = runner.batch_invariant, runner.max_rows
        self.tile_queries = tile_queries(*runner.heads, self.batch_invariant)
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        rows, blocks = runner.tables.shape
        self.max_tokens = 2 * (max_batched_tokens + rows) + 64  # a captured shape is larger than the step
        ring = RING * runner.group.pipe.stages  # a step has as many micro-batches
        capacity = 14 * self.max_tokens + 2 * FILL + rows * (blocks + 8)
        self.staging = Staging(capacity, ring, rows, runner.device)
        self._tokens = torch.empty(2, self.max_tokens, dtype=torch.int64, device=runner.device)  # input ids, slots
        self.graphs = StepGraphs(self, vocab_size, dtype, self.max_tokens, runner.device, runner.group)

    # ---- what goes in ------------------------------------------------------------------------------------------------

    def stage(self, batch: Batch, edits: list[tuple[int, int, IntArray]], *, capture: bool = True) -> Staged:
        """Send a step's inputs, entries of one token first, and with them edits (row, first entry, block ids).

        capture: use the graphs, if there is a shape that holds the step.
        """
        order, step, tiles = self._arrange(batch)
        fitting = self.graphs.fit(step) if capture and self._runner.group.capturable else None
        shape = fitting or plain_shape(step)
        counts = batch.counts[order]
        ends = np.cumsum(counts)
        starts = ends - counts
        of_token = np.repeat(order, counts)  # [num_tokens]
        offset = np.arange(step.tokens) - np.repeat(starts, counts)
        ids = np.full(step.tokens, -1, dtype=np.int32)
        known = batch.in_prefill[of_token]
        given = batch.counts * batch.in_prefill
        ids[known] = batch.prefill_ids[((np.cumsum(given) - given)[of_token] + offset)[known]]
        gap = shape.decode - step.decode  # entries that pad the first part, behind which the second begins

        def padded(values: IntArray, fill: int = 0) -> IntArray:
            return np.concatenate((values[: step.decode], np.full(gap, fill), values[step.decode :])) if gap else values

        parts = {
            "ids": ids,
            "positions": batch.start[of_token] + offset,
            "token_rows": np.where(batch.frozen[of_token], -1, batch.rows[of_token]),
            "prompt_lens": self._runner.prompt[batch.rows[of_token]],
            "entry_rows": padded(batch.rows[order]),
            "seq_lens": padded((batch.start + batch.counts)[order]),
            "sample_index": padded(ends - 1),
            "sample_rows": padded(np.where(batch.samples, batch.rows, self.max_rows)[order], self.max_rows),
            "query_start": np.append(padded(starts, int(ends[step.decode - 1]) if step.decode else 0), step.tokens),
            "tile_entry": tiles[0] + gap * (tiles[0] >= step.decode) if gap else tiles[0],
            "tile_start": tiles[1],
        }
        if self._num_shares(step):
            lens = parts["seq_lens"][: step.decode]
            names = "share_keys", "share_entry", "share_number"
            parts.update(zip(names, decode_shares(lens, self._runner.heads[1])))
        sent = self.staging.send(parts, self._sections(shape), edits)
        if edits:
            edit_tables(sent, len(edits), self._runner.block_table)
        begins, entries = np.empty_like(starts), np.empty_like(order)
        begins[order] = starts
        entries[order] = np.arange(len(order)) + gap * (np.arange(len(order)) >= step.decode)
        return Staged(shape, fitting is not None, begins, entries)

    def _arrange(self, batch: Batch) -> tuple[IntArray, Shape, tuple[Any, Any]]:
        """-> order of the entries, their sizes, tiles of queries; batch-invariant: every entry goes through tiles."""
        alone = batch.counts == 1
        order = np.concatenate([np.nonzero(alone)[0], np.nonzero(~alone)[0]])
        counts, num_decode = batch.counts[order], int(alone.sum())
        if self.batch_invariant:
            tiles = invariant_tiles(counts, (batch.start + batch.counts)[order])
        else:
            tiles = prefill_tiles(counts[num_decode:], num_decode, self.tile_queries)
        return order, Shape(int(counts.sum()), num_decode, len(order) - num_decode, len(tiles[0])), tiles

    def stage_padding(self, shape: Shape) -> None:
        """Stage a step of that shape in which nothing happens."""
        self.staging.send({"query_start": np.zeros(1, dtype=np.int32)}, self._sections(shape), [])

    def _num_shares(self, shape: Shape) -> int:
        """Of decode attention; batch-invariant: there is none."""
        return 0 if self.batch_invariant else num_shares(shape.decode, self._runner.heads[1])

    def _sections(self, shape: Shape) -> dict[str, slice]:
        return sections(shape, self._num_shares(shape))

    # ---- what is computed --------------------------------------------------------------------------------------------

    def compute(self, staged: Staged) -> None:
        """Logits of a captured step, left where `sample` finds them."""
        self.graphs.compute(staged.shape)

    def sample(self, staged: Staged) -> SamplerOutput:
        """The next token of every entry; those that do not sample draw into the scratch row."""
        return self.graphs.sample(staged.shape.entries)

    def logits(self, shape: Shape, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the staged step, a row for each entry, and the sampler's row for each."""
        views = self._views(shape)
        hidden = self.hidden(shape) if hidden is None else hidden
        last = hidden[views["sample_index"]] if shape.prefill else hidden
        return self._runner.model.compute_logits(last), views["sample_rows"].long()

    def _views(self, shape: Shape) -> dict[str, Tensor]:
        return {name: self.staging.device_buffer[place] for name, place in self._sections(shape).items()}

    def hidden(self, shape: Shape) -> Tensor:
        """Complete the tokens of the staged step, then the model; -> `[tokens, hidden_size]`."""
        runner, v = self._runner, self._views(shape)
        size, (input_ids, slots) = runner.kv_config.block_size, self._tokens[:, : shape.tokens]
        token_inputs(
            v["ids"],
            v["positions"],
            v["token_rows"],
            runner.sampler.last_token,
            runner.block_table,
            size,
            input_ids,
            slots,
        )
        meta = DeviceMetadata(
            block_table=runner.block_table,
            rows=v["entry_rows"],
            seq_lens=v["seq_lens"],
            query_start=v["query_start"],
            num_decode=0 if self.batch_invariant else shape.decode,
            share_keys=v["share_keys"],
            share_entry=v["share_entry"],
            share_number=v["share_number"],
            tile_entry=v["tile_entry"] if shape.tiles else None,
            tile_start=v["tile_start"] if shape.tiles else None,
            tile_queries=self.tile_queries,
            block_size=size,
            contiguous=runner.kv_config.layout == "slab",
        )
        ctx = ForwardContext(*runner.caches, slots, v["prompt_lens"], meta, self.batch_invariant)
        return runner.model.forward(input_ids, v["positions"], ctx)
