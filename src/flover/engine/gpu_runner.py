"""The runner on a GPU: one staging copy a step, CUDA graphs for decode, results read back while later steps run.

`execute` only enqueues. A step whose rows take one token each runs as two graphs, up to the logits and sampling, of the
smallest bucket that holds it; rows that pad it read nothing, store nothing and draw into the sampler's scratch row. Any
other step (a prefill chunk, log-probabilities, penalties) runs kernel by kernel. Row state has its truth on the host,
which knows it exactly; the block table and the tokens drawn last live on the device.
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
from flover.engine.runner import Batch, ModelRunner
from flover.engine.staging import Staging, sections
from flover.kernels.triton.attention import DeviceMetadata, invariant_tiles, prefill_tiles
from flover.kernels.triton.inputs import edit_tables, token_inputs
from flover.layers.attention import ForwardContext
from flover.layers.sampler import SamplerOutput
from flover.startup import StartupTimes

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
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

    def __init__(self, config: ResolvedConfig, folder: Path, times: StartupTimes | None = None) -> None:
        super().__init__(config, folder, "triton", times)
        rows, blocks = self.tables.shape
        tokens = config.scheduler.max_num_batched_tokens + 2 * rows + 8  # a bucket may be larger than the batch
        self.max_rows = rows
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._copy_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.block_table = torch.zeros(rows, blocks, dtype=torch.int32, device=self.device)
        self.staging = Staging(9 * tokens + rows * (blocks + 8), RING, rows, self.device)
        self._tokens = torch.empty(2, tokens, dtype=torch.int64, device=self.device)  # input ids, slots
        self._results = [torch.empty(tokens, dtype=torch.int64, pin_memory=True) for _ in range(RING)]
        self._events = [torch.cuda.Event() for _ in range(RING)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self.graphs = DecodeGraphs(self)
        torch.cuda.current_stream().synchronize()  # the weights are there before another stream reads them

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> StepResult | Pending:  # type: ignore[override]
        with torch.cuda.stream(self.stream):
            self._apply(plan)
            batch = self._batch(plan)
            if batch is None:
                return self.empty_result()
            bucket = next((b for b in BUCKETS if b >= len(batch.rows)), None)
            if batch.counts.max() == 1 and bucket is not None and not plan.scored:
                return self._decode(batch, bucket)
            return self._eager(plan, batch)

    def _decode(self, batch: Batch, bucket: int) -> Pending:
        """One token a row: the graphs of a bucket."""
        order = np.arange(len(batch.rows))
        _, tiles = self._tiles(batch, order, len(order))
        self._send(batch, order, self.decode_places(bucket), tiles, every_row=True)
        self.graphs.forward(bucket)
        return self._read_back(self.graphs.sample(bucket), np.nonzero(batch.samples)[0], ())

    def _eager(self, plan: BatchPlan, batch: Batch) -> StepResult | Pending:
        """Entries of one token first, then prefill tiles."""
        alone = batch.counts == 1
        order = np.concatenate([np.nonzero(alone)[0], np.nonzero(~alone)[0]])
        num_decode = int(alone.sum())
        counts = batch.counts[order]
        num_decode, tiles = self._tiles(batch, order, num_decode)
        places = sections(int(counts.sum()), len(order), len(tiles[0]))
        begins = self._send(batch, order, places, tiles)
        hidden = self.model.forward(*self.step_inputs(places, num_decode))
        first = dict(zip(batch.rows.tolist(), begins.tolist()))
        scores = tuple(self._score(hidden[first[row] :], best, ids) for row, _, best, ids in plan.scored)
        num_samples = int(batch.samples.sum())
        if not num_samples:
            return self.empty_result()._replace(prompt_scores=scores)
        views = self.views(places)
        logits = self.model.compute_logits(hidden[views["sample_index"][:num_samples]])
        output = self.sampler.sample(logits, views["sample_rows"][:num_samples].long())
        return self._read_back(output, slice(0, num_samples), scores)

    def _tiles(self, batch: Batch, order: IntArray, num_decode: int) -> tuple[int, tuple[Any, Any]]:
        """Entries that the decode kernel takes, and the query tiles of the others; batch-invariant: all in tiles."""
        counts = batch.counts[order]
        if self.batch_invariant:
            return 0, invariant_tiles(counts, (batch.start + batch.counts)[order])
        return num_decode, prefill_tiles(counts[num_decode:], num_decode)

    # ---- what goes in ------------------------------------------------------------------------------------------------

    def _send(
        self,
        batch: Batch,
        order: IntArray,
        places: dict[str, slice],
        tiles: tuple[Any, Any] = ((), ()),
        every_row: bool = False,
    ) -> IntArray:
        """Stage a step, tokens of its entries in `order`; -> where each entry of the batch begins.

        every_row: logits exist for every entry, in order; those that do not sample draw into the scratch row.
        """
        counts = batch.counts[order]
        ends = np.cumsum(counts)
        begins = np.empty_like(ends)
        begins[order] = ends - counts
        entry = np.repeat(order, counts)  # [num_tokens]
        offset = np.arange(len(entry)) - np.repeat(ends - counts, counts)
        ids = np.full(len(entry), -1, dtype=np.int32)
        known = batch.in_prefill[entry]
        given = batch.counts * batch.in_prefill
        ids[known] = batch.prefill_ids[((np.cumsum(given) - given)[entry] + offset)[known]]
        rows = batch.rows[order]
        sampled = np.nonzero(batch.samples)[0]
        sample_rows = np.where(batch.samples, batch.rows, self.max_rows) if every_row else batch.rows[sampled]
        parts = {
            "ids": ids,
            "positions": batch.start[entry] + offset,
            "token_rows": np.where(batch.frozen[entry], -1, batch.rows[entry]),
            "prompt_lens": self.prompt[batch.rows[entry]],
            "entry_rows": rows,
            "seq_lens": (batch.start + batch.counts)[order],
            "sample_index": (begins + batch.counts - 1)[sampled],
            "sample_rows": sample_rows,
            "query_start": np.concatenate([[0], ends]),
            "tile_entry": tiles[0],
            "tile_start": tiles[1],
        }
        edits = [(row, lo, self.tables[row, lo:hi]) for row, (lo, hi) in self.edited.items() if lo < hi]
        self.edited.clear()
        sent = self.staging.send(parts, places, edits)
        if edits:
            edit_tables(sent, len(edits), self.block_table)
        return begins

    def decode_places(self, bucket: int) -> dict[str, slice]:
        """Where the parts of a decode step lie: one token an entry; batch-invariant: a tile of its own too."""
        return sections(bucket, bucket, bucket if self.batch_invariant else 0)

    def views(self, places: dict[str, slice]) -> dict[str, Tensor]:
        return {name: self.staging.device_buffer[place] for name, place in places.items()}

    def step_inputs(self, places: dict[str, slice], num_decode: int) -> tuple[Tensor, Tensor, ForwardContext]:
        """Launch the kernel that completes the tokens of a staged step; -> what the model's forward takes."""
        v = self.views(places)
        n, size = len(v["ids"]), self.kv_config.block_size
        input_ids, slots = self._tokens[:, :n]
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
            num_decode=num_decode,
            tile_entry=v["tile_entry"] if len(v["tile_entry"]) else None,
            tile_start=v["tile_start"] if len(v["tile_entry"]) else None,
            block_size=size,
            contiguous=self.kv_config.layout == "slab",
        )
        ctx = ForwardContext(self.storage.k, self.storage.v, slots, v["prompt_lens"], meta, self.batch_invariant)
        return input_ids, v["positions"], ctx

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


class DecodeGraph:
    """A bucket's forward graph and its logits."""

    def __init__(self, forward: torch.cuda.CUDAGraph, logits: Tensor, rows: Tensor) -> None:
        self.forward, self.logits, self.rows = forward, logits, rows
        self.sampling: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, SamplerOutput]] = {}


class DecodeGraphs:
    """Captured when first needed, in one memory pool; the sampling graph of a bucket once per kind of sampling."""

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, DecodeGraph] = {}

    def forward(self, bucket: int) -> None:
        """Run the step that is staged: kernel by kernel the first time, which compiles them, then as a graph."""
        runner = self._runner
        if bucket in self._graphs:
            self._graphs[bucket].forward.replay()
            return
        places = runner.decode_places(bucket)

        def run() -> tuple[Tensor, Tensor]:
            hidden = runner.model.forward(*runner.step_inputs(places, 0 if runner.batch_invariant else bucket))
            return runner.model.compute_logits(hidden), runner.views(places)["sample_rows"].long()

        run()
        graph, (logits, rows) = self._record(run)
        graph.replay()  # the same tokens to the same slots once more
        self._graphs[bucket] = DecodeGraph(graph, logits, rows)

    def sample(self, bucket: int) -> SamplerOutput:
        """Sampling of a bucket's logits; what few requests need (penalties, log-probabilities) runs uncaptured."""
        graph, sampler = self._graphs[bucket], self._runner.sampler
        kind = sampler.graph_key
        if kind is None:
            return sampler.sample(graph.logits, graph.rows)
        if kind not in graph.sampling:
            output = sampler.sample(graph.logits, graph.rows)  # this step's, and it compiles what is recorded next
            graph.sampling[kind] = self._record(lambda: sampler.sample(graph.logits, graph.rows))
            return output
        captured, output = graph.sampling[kind]
        captured.replay()
        return output

    def _record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._runner.stream, capture_error_mode="thread_local"):
            output = function()
        return graph, output
