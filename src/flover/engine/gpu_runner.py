"""The runner on a GPU: one staging copy a step, CUDA graphs for decode, results read back while later steps run.

`execute` only enqueues. A step runs as two graphs, up to the logits and sampling (`cuda_graph`), but a long prefill, or
one whose prompt is scored, kernel by kernel. Row state has its truth on the host, which knows it exactly; the block
table and the tokens drawn last live on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flover.config import ResolvedConfig
from flover.engine.batch import BatchPlan, IntArray, Scores, StepResult
from flover.engine.cuda_graph import Shape, StepGraphs
from flover.engine.runner import Batch, ModelRunner
from flover.engine.staging import Staging, sections
from flover.kernels.triton.attention import DeviceMetadata, invariant_tiles, prefill_tiles
from flover.kernels.triton.inputs import edit_tables, token_inputs
from flover.layers.attention import ForwardContext
from flover.layers.sampler import SamplerOutput

RING = 3  # overlap depth 1: a step in flight, one being submitted, and one whose buffers are still read


class Pending:
    """A step on its way: `result` waits for its own event, not for what was enqueued behind it."""

    def __init__(self, event: torch.cuda.Event, read: Callable[[], StepResult]) -> None:
        self._event, self._read = event, read

    def result(self) -> StepResult:
        self._event.synchronize()
        return self._read()


class GpuRunner(ModelRunner):
    """As `ModelRunner`, for the Triton backend."""

    def __init__(self, config: ResolvedConfig, folder: Path) -> None:
        super().__init__(config, folder, "triton")
        rows, blocks = self.tables.shape
        tokens = (
            2 * (config.scheduler.max_num_batched_tokens + rows) + 64
        )  # a captured shape may be larger than the step
        self.max_rows = rows
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._copy_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.block_table = torch.zeros(rows, blocks, dtype=torch.int32, device=self.device)
        self.staging = Staging(11 * tokens + rows * (blocks + 8), RING, rows, self.device)
        self._tokens = torch.empty(2, tokens, dtype=torch.int64, device=self.device)  # input ids, slots
        self._results = [torch.empty(tokens, dtype=torch.int64, pin_memory=True) for _ in range(RING)]
        self._events = [torch.cuda.Event() for _ in range(RING)]  # type: ignore[no-untyped-call]
        self._turn = 0
        dtype: torch.dtype = getattr(torch, config.engine.dtype)
        self._graphs = StepGraphs(self, config.model.vocab_size, dtype, tokens, self.device)
        torch.cuda.current_stream().synchronize()  # the weights are there before another stream reads them

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile kernels and capture graphs ahead of the first request, for a few seconds at most."""
        with torch.cuda.stream(self.stream):
            self._graphs.warm_up()

    @torch.inference_mode()
    def capture_largest(self) -> None:
        """The graphs that take the most memory."""
        with torch.cuda.stream(self.stream):
            self._graphs.capture_largest()

    def reset(self) -> None:
        """As `ModelRunner.reset`; memory that PyTorch holds without using it goes back, should it have run out."""
        super().reset()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> StepResult | Pending:  # type: ignore[override]
        with torch.cuda.stream(self.stream):
            self._apply(plan)
            batch = self._batch(plan)
            if batch is None:
                return self.empty_result()
            order, step, tiles = self._arrange(batch)
            shape = None if plan.scored else self._graphs.fit(step)
            begins, entries = self._send(batch, order, step, shape or step, tiles)
            where = entries[batch.samples]
            if shape is not None:
                return self._read_back(self._graphs.run(shape), where, ())
            hidden = self._hidden(step)
            first = dict(zip(batch.rows.tolist(), begins.tolist()))
            scores = tuple(self._score(hidden[first[row] :], best, ids) for row, _, best, ids in plan.scored)
            if not len(where):
                return self.empty_result()._replace(prompt_scores=scores)
            return self._read_back(self.sampler.sample(*self._logits(hidden, step)), where, scores)

    def _arrange(self, batch: Batch) -> tuple[IntArray, Shape, tuple[Any, Any]]:
        """Entries of one token first, then those of more; -> their order, sizes, and the tiles of queries.

        Batch-invariant: every entry goes through tiles.
        """
        alone = batch.counts == 1
        order = np.concatenate([np.nonzero(alone)[0], np.nonzero(~alone)[0]])
        counts, num_decode = batch.counts[order], int(alone.sum())
        if self.batch_invariant:
            tiles = invariant_tiles(counts, (batch.start + batch.counts)[order])
        else:
            tiles = prefill_tiles(counts[num_decode:], num_decode)
        return order, Shape(int(counts.sum()), num_decode, len(order) - num_decode, len(tiles[0])), tiles

    # ---- what goes in ------------------------------------------------------------------------------------------------

    def _send(
        self, batch: Batch, order: IntArray, step: Shape, shape: Shape, tiles: tuple[Any, Any]
    ) -> tuple[IntArray, IntArray]:
        """Stage a step under a shape that holds it; -> where each entry of the batch begins, and which entry it is."""
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
            "prompt_lens": self.prompt[batch.rows[of_token]],
            "entry_rows": padded(batch.rows[order]),
            "seq_lens": padded((batch.start + batch.counts)[order]),
            "sample_index": padded(ends - 1),
            "sample_rows": padded(np.where(batch.samples, batch.rows, self.max_rows)[order], self.max_rows),
            "query_start": np.append(padded(starts, int(ends[step.decode - 1]) if step.decode else 0), step.tokens),
            "tile_entry": tiles[0] + gap * (tiles[0] >= step.decode) if gap else tiles[0],
            "tile_start": tiles[1],
        }
        edits = [(row, lo, self.tables[row, lo:hi]) for row, (lo, hi) in self.edited.items() if lo < hi]
        self.edited.clear()
        sent = self.staging.send(parts, sections(shape), edits)
        if edits:
            edit_tables(sent, len(edits), self.block_table)
        begins, entries = np.empty_like(starts), np.empty_like(order)
        begins[order] = starts
        entries[order] = np.arange(len(order)) + gap * (np.arange(len(order)) >= step.decode)
        return begins, entries

    def stage_padding(self, shape: Shape) -> None:
        """Stage a step of that shape in which nothing happens."""
        self.staging.send({"query_start": np.zeros(1, dtype=np.int32)}, sections(shape), [])

    # ---- what is computed --------------------------------------------------------------------------------------------

    def logits(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Logits of the staged step, a row for each entry, and the sampler's row for each."""
        return self._logits(self._hidden(shape), shape)

    def _logits(self, hidden: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        views = self._views(shape)
        last = hidden[views["sample_index"]] if shape.prefill else hidden
        return self.model.compute_logits(last), views["sample_rows"].long()

    def _views(self, shape: Shape) -> dict[str, Tensor]:
        return {name: self.staging.device_buffer[place] for name, place in sections(shape).items()}

    def _hidden(self, shape: Shape) -> Tensor:
        """Complete the tokens of the staged step, then the model; -> `[tokens, hidden_size]`."""
        v, size = self._views(shape), self.kv_config.block_size
        input_ids, slots = self._tokens[:, : shape.tokens]
        token_inputs(
            v["ids"],
            v["positions"],
            v["token_rows"],
            self.sampler.last_token,
            self.block_table,
            size,
            input_ids,
            slots,
        )
        meta = DeviceMetadata(
            block_table=self.block_table,
            rows=v["entry_rows"],
            seq_lens=v["seq_lens"],
            query_start=v["query_start"],
            num_decode=0 if self.batch_invariant else shape.decode,
            tile_entry=v["tile_entry"] if shape.tiles else None,
            tile_start=v["tile_start"] if shape.tiles else None,
            block_size=size,
            contiguous=self.kv_config.layout == "slab",
        )
        ctx = ForwardContext(self.storage.k, self.storage.v, slots, v["prompt_lens"], meta, self.batch_invariant)
        return self.model.forward(input_ids, v["positions"], ctx)

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def _read_back(self, output: SamplerOutput, where: Any, scores: tuple[Scores, ...]) -> Pending:
        """Copy a step's tokens to pinned memory beside the next step's kernels; -1 is a token that is not finite.

        Args:
            where: places of the sampled rows, in row order, among the output's.
        """
        turn = self._turn = (self._turn + 1) % RING
        drawn = torch.where(output.finite, output.token_ids, -1)  # its own memory: the graph's is overwritten
        host, event = self._results[turn][: len(drawn)], self._events[turn]
        logprobs = None
        self._copy_stream.wait_stream(self.stream)
        with torch.cuda.stream(self._copy_stream):
            host.copy_(drawn, non_blocking=True)
            drawn.record_stream(self._copy_stream)
            if output.logprobs is not None:
                logprobs = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in output.logprobs]
                for mine, part in zip(logprobs, output.logprobs):
                    mine.copy_(part, non_blocking=True)
                    part.record_stream(self._copy_stream)
            event.record()

        def read() -> StepResult:
            tokens = host.numpy()[where].copy()
            finite = tokens >= 0
            best = None if logprobs is None else Scores(*(part.numpy()[where] for part in logprobs))
            return StepResult(tokens * finite, finite, best, scores)

        return Pending(event, read)
