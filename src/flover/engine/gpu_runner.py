"""The runner on a GPU: one staging copy a step, CUDA graphs, results read back while later steps run.

`execute` only enqueues. A step runs as two graphs, up to the logits and sampling (`cuda_graph`), but kernel by kernel
if it has a long prefill, is cut into micro-batches or scores a prompt. Row state has its truth on the host, which knows
it exactly; the block table and the tokens drawn last live on the device. In prefill mode "overlap" a step's prefill has
a lane of its own; the step is sampled when both have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flover.config import ResolvedConfig
from flover.engine.batch import BatchPlan, IntArray, RowMasks, Scores, StepResult
from flover.engine.lane import RING, Lane, Staged
from flover.engine.runner import Batch, Mask, ModelRunner, micro_batches
from flover.layers.sampler import SamplerOutput
from flover.models.base import CausalLM
from flover.parallel import ALONE, Group
from flover.sharding import local_kv_heads
from flover.startup import StartupTimes

MICRO_BATCH = 256  # tokens, at least: fewer take a stage as long, which reads its weights for either


class Pending:
    """A step on its way: `result` waits for its own event, not for what was enqueued behind it."""

    def __init__(self, event: torch.cuda.Event, read: Callable[[], StepResult]) -> None:
        self._event, self._read = event, read

    def result(self, timeout: float | None = None) -> StepResult:
        """Raises `TimeoutError` of concurrent.futures; a group asks with a timeout, as a rank may be lost meanwhile."""
        if timeout is None:
            self._event.synchronize()
        else:
            end = time.monotonic() + timeout
            while not self._event.query():  # type: ignore[no-untyped-call]
                if time.monotonic() > end:
                    raise FutureTimeout
        return self._read()


class GpuRunner(ModelRunner):
    """As `ModelRunner`, for the Triton backend."""

    def __init__(
        self,
        config: ResolvedConfig,
        folder: Path,
        times: StartupTimes | None = None,
        model: CausalLM | None = None,
        group: Group = ALONE,
    ) -> None:
        super().__init__(config, folder, "triton", times, model, group)
        self.max_rows, blocks = self.tables.shape
        self.heads = config.model.num_heads // group.size, local_kv_heads(config.model, group.size)
        self.block_table = torch.zeros(self.max_rows, blocks, dtype=torch.int32, device=self.device)
        tokens, width = config.scheduler.max_num_batched_tokens, self.sampler.part.size
        sizes = tokens, width, getattr(torch, config.engine.dtype)
        self._lane = Lane(self, *sizes)
        self._side = Lane(self, *sizes) if config.scheduler.prefill_mode == "overlap" else None
        # of its own pool: PyTorch has 32 streams a priority, so 32 runners in a process (bench.instances) share no lane
        self._copy_stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        self._results = [torch.empty(self._lane.max_tokens, dtype=torch.int64, pin_memory=True) for _ in range(RING)]
        self._events = [torch.cuda.Event() for _ in range(RING)]  # type: ignore[no-untyped-call]
        self._turn = 0
        torch.cuda.current_stream().synchronize()  # the weights are there before another stream reads them

    def wait_asleep(self) -> None:
        self._events = [torch.cuda.Event(blocking=True) for _ in range(RING)]  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def warm_up(self, seconds: float) -> None:
        """Compile kernels and capture graphs before they are needed; begins nothing new after `seconds`."""
        if not self.group.capturable:
            return
        for lane in (self._lane, self._side):
            if lane is not None:
                with torch.cuda.stream(lane.stream):
                    lane.graphs.warm_up(seconds, prefill_only=lane is self._side)

    @torch.inference_mode()
    def capture_largest(self) -> None:
        """The graphs that take the most memory."""
        for lane in (self._lane, self._side):
            if lane is not None:
                with torch.cuda.stream(lane.stream):
                    lane.graphs.capture_largest()

    def close(self) -> None:
        """Forget the graphs: a communicator does not end while one holds its collectives."""
        for lane in (self._lane, self._side):
            if lane is not None:
                lane.graphs.clear()

    def reset(self) -> None:
        """As `ModelRunner.reset`; memory that PyTorch holds without using it goes back, should it have run out."""
        super().reset()
        torch.cuda.empty_cache()

    def execute(self, plan: BatchPlan) -> StepResult | Pending:  # type: ignore[override]
        return super().execute(plan)

    def sample(self, masks: RowMasks | None) -> StepResult | Pending:  # type: ignore[override]
        with torch.cuda.stream(self._lane.stream):
            return super().sample(masks)

    def _forward_of(self, plan: BatchPlan) -> Callable[[], StepResult | Pending]:  # type: ignore[override]
        with torch.cuda.stream(self._lane.stream):
            sample = self._compute(plan)
            self.group.pipe.flush()
            return sample

    def _compute(self, plan: BatchPlan) -> Callable[[], StepResult | Pending]:
        self._apply(plan)
        batch = self._batch(plan)
        if batch is None:
            return self.empty_result
        edits = [(row, lo, self.tables[row, lo:hi]) for row, (lo, hi) in self.edited.items() if lo < hi]
        self.edited.clear()
        alone = batch.counts == 1
        if plan.scored or plan.pooled:
            return self._scored(plan, batch, edits)
        if self._side is not None and alone.any() and not alone.all():
            return self._overlapped(self._side, batch, alone, edits)
        parts = micro_batches(batch, max(min(self.group.pipe.stages, int(batch.counts.sum()) // MICRO_BATCH), 1))
        if len(parts) > 1:
            return self._in_parts(parts, edits)
        staged = self._lane.stage(batch, edits)
        draw = self._drawing(self._lane, staged)
        return lambda: self._read_back(draw(), staged.entries[batch.samples], ())

    def _drawing(self, lane: Lane, staged: Staged) -> Callable[[], SamplerOutput]:
        """Compute a staged step up to its logits; -> what samples them."""
        if staged.captured:
            lane.compute(staged)
            return lambda: lane.sample(staged)
        logits, rows = lane.logits(staged.shape)
        return lambda: self.sampler.sample(logits, rows)

    def _scored(
        self, plan: BatchPlan, batch: Batch, edits: list[tuple[int, int, IntArray]]
    ) -> Callable[[], StepResult | Pending]:
        """A step whose prompts are scored or pooled needs all its hidden states, so it runs kernel by kernel."""
        staged = self._lane.stage(batch, edits, capture=False)
        hidden = self._lane.hidden(staged.shape)
        first = dict(zip(batch.rows.tolist(), staged.begins.tolist()))
        scores, pooled = self._of_prompts(plan, batch, hidden, first)
        logits, rows = self._lane.logits(staged.shape, hidden)
        return lambda: self._read_back(self.sampler.sample(logits, rows), staged.entries[batch.samples], scores, pooled)

    def _in_parts(
        self, parts: list[Batch], edits: list[tuple[int, int, IntArray]]
    ) -> Callable[[], StepResult | Pending]:
        """Micro-batches, on which the stages of a pipeline work at the same time; then all are sampled together.

        Kernel by kernel: graphs leave their logits in one buffer, and the device takes longer than the host.
        """
        logits, rows, where = list[Tensor](), list[Tensor](), list[IntArray]()
        for part in parts:
            staged = self._lane.stage(part, edits, capture=False)
            where.append(staged.entries[part.samples] + sum(map(len, rows)))
            of_part = self._lane.logits(staged.shape)
            logits.append(of_part[0])
            rows.append(of_part[1])
            edits = []
        every = torch.cat(logits), torch.cat(rows)
        return lambda: self._read_back(self.sampler.sample(*every), np.concatenate(where), ())

    def _overlapped(
        self, side: Lane, batch: Batch, alone: Mask, edits: list[tuple[int, int, IntArray]]
    ) -> Callable[[], StepResult | Pending]:
        """Decode and prefill at once, each on its lane; then both are sampled."""
        lane, where = self._lane, np.empty_like(batch.rows)
        first = lane.stage(batch.part(alone), edits)
        side.stream.wait_stream(lane.stream)  # for what the prefill reads: tables, copied blocks
        draw_first = self._drawing(lane, first) if first.captured else None
        with torch.cuda.stream(side.stream):
            second = side.stage(batch.part(~alone), [])
            draw_second = self._drawing(side, second)
        draw = draw_first or self._drawing(lane, first)
        lane.stream.wait_stream(side.stream)

        def sample() -> Pending:
            outputs = draw(), draw_second()
            where[alone], where[~alone] = first.entries, second.entries + len(outputs[0].token_ids)
            return self._read_back(_together(*outputs), where[batch.samples], ())

        return sample

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def _read_back(
        self, output: SamplerOutput, where: Any, scores: tuple[Scores, ...], pooled: tuple[Any, ...] = ()
    ) -> Pending:
        """Copy a step's tokens to pinned memory beside the next step's kernels.

        -1 is a token that is not finite, -2 one that is not because every token is masked.

        Args:
            where: places of the sampled rows, in row order, among the output's.
        """
        turn = self._turn = (self._turn + 1) % RING
        drawn = torch.where(output.finite, output.token_ids, -1)  # its own memory: the graph's is overwritten
        if output.exhausted is not None:
            drawn = torch.where(output.exhausted, -2, drawn)
        host, event = self._results[turn][: len(drawn)], self._events[turn]
        logprobs = None
        self._copy_stream.wait_stream(self._lane.stream)
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
            exhausted = None if output.exhausted is None else tokens == -2
            return StepResult(tokens * finite, finite, best, scores, pooled, exhausted)

        return Pending(event, read)


def _together(a: SamplerOutput, b: SamplerOutput) -> SamplerOutput:
    logprobs: Any = None
    if a.logprobs is not None and b.logprobs is not None:
        logprobs = tuple(torch.cat(pair) for pair in zip(a.logprobs, b.logprobs))
    exhausted = None if a.exhausted is None or b.exhausted is None else torch.cat((a.exhausted, b.exhausted))
    return SamplerOutput(torch.cat((a.token_ids, b.token_ids)), torch.cat((a.finite, b.finite)), logprobs, exhausted)
