"""CUDA graphs of a step, by its shape: one up to the logits, one for sampling.

A step is padded to the smallest shape that holds it: rows that pad it read nothing, store nothing and draw into the
sampler's scratch row. Likely shapes are captured at start, for a few seconds at most; any other the second time that it
is needed, since one that comes once is cheapest kernel by kernel. All graphs share one memory pool and leave their
logits in one buffer: they run one after the other, and sampling reads the buffer before the next begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flover.layers.sampler import Sampler, SamplerOutput
from flover.parallel import ALONE, Group
from flover.request import RowSampling

logger = logging.getLogger("flover")

# rows of a step of decode alone; tokens of one with prefill: beyond the largest the device takes longer than the host
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)
TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
MIXED_ROWS = (32, 128)  # that decode in a step with prefill, or all
MAX_PREFILLS = 64
WARM_UP_SECONDS = 4.0  # of a start: with a filled Triton cache most shapes


class Shape(NamedTuple):
    """Sizes of a step: `decode` entries of one token come first, then `prefill` entries, in `tiles` of queries."""

    tokens: int
    decode: int
    prefill: int
    tiles: int

    @property
    def entries(self) -> int:
        return self.decode + self.prefill


def decode_shape(rows: int, *, tiled: bool) -> Shape | None:
    """The captured shape for one token of each row; tiled: every query has a tile, too (batch-invariant)."""
    bucket = next((b for b in ROWS if b >= rows), None)
    return None if bucket is None else Shape(bucket, bucket, 0, bucket if tiled else 0)


def mixed_shape(step: Shape, max_rows: int, tile_queries: int) -> Shape | None:
    """The captured shape for a step with prefill, whose tiles have so many queries; None if none holds it."""
    tokens = next((t for t in TOKENS if t >= step.tokens), None)
    full = next((b for b in ROWS if b >= max_rows), ROWS[-1])
    if tokens is None or step.decode > full:
        return None
    prefill = min(max(tokens // 8, 8), MAX_PREFILLS)
    decode = min(b for b in (*(min(rows, full) for rows in MIXED_ROWS), full) if b >= step.decode)
    shape = Shape(tokens, decode, prefill, tokens // tile_queries + 1 + prefill)
    return shape if step.prefill <= shape.prefill and step.tiles <= shape.tiles else None


def plain_shape(step: Shape) -> Shape:
    """The shape of a step that runs kernel by kernel: its entries are padded to a multiple of 64.

    Else the head were a product of ever new sizes, for which cuBLAS loads ever new kernels, and the host would wait for
    an idle device each time.
    """
    return step._replace(prefill=-(-step.entries // 64) * 64 - step.decode)


class Steps(Protocol):
    """What the graphs are made of."""

    sampler: Sampler
    batch_invariant: bool
    max_rows: int
    tile_queries: int

    def stage_padding(self, shape: Shape) -> None: ...
    def logits(self, shape: Shape) -> tuple[Tensor, Tensor]: ...


class StepGraphs:
    """vocab_size, dtype: of the logits. max_tokens: no step has more.

    group: the ranks whose collectives are recorded too; all record and replay the same graphs in the same order.
    """

    def __init__(
        self,
        steps: Steps,
        vocab_size: int,
        dtype: torch.dtype,
        max_tokens: int,
        device: torch.device,
        group: Group = ALONE,
    ) -> None:
        self._steps, self._max_tokens = steps, max_tokens
        self._group, self._device = group, device
        self._pool = torch.cuda.graph_pool_handle()
        self._forward: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._sampling: dict[tuple[int, tuple[bool, ...]], tuple[torch.cuda.CUDAGraph, SamplerOutput]] = {}
        self._seen: set[Shape] = set()
        entries = max((b for b in ROWS if b < 2 * steps.max_rows), default=1) + MAX_PREFILLS
        self._logits = torch.empty(entries, vocab_size, dtype=dtype, device=device)
        self._rows = torch.empty(entries, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Nothing is replayed any more."""
        self._forward.clear()
        self._sampling.clear()

    def fit(self, step: Shape) -> Shape | None:
        """The shape under which a step runs, None: as it is, without a graph."""
        invariant = self._steps.batch_invariant
        if step.prefill:
            shape = None if invariant else mixed_shape(step, self._steps.max_rows, self._steps.tile_queries)
        else:
            shape = decode_shape(step.decode, tiled=invariant)
        return shape if shape and shape.entries <= len(self._rows) and shape.tokens <= self._max_tokens else None

    def warm_up(self, seconds: float, prefill_only: bool = False) -> None:
        """Compile and capture what is likely to be needed, until the time is over."""
        started = time.monotonic()
        for shape in self._likely():
            if shape not in self._forward and (shape.prefill or not prefill_only):
                self._capture(shape)
            if self._group.agree(time.monotonic() - started > seconds, self._device):
                break
        torch.cuda.current_stream().synchronize()
        logger.info("captured %d step shapes in %.1f s", len(self._forward), time.monotonic() - started)

    def capture_largest(self) -> None:
        """The shapes that need the most memory."""
        rows = self._steps.max_rows
        for step in (Shape(TOKENS[-1], rows, 1, 1), Shape(TOKENS[-1], 1, 1, 1), Shape(rows, rows, 0, 0)):
            shape = self.fit(step)
            if shape is not None:
                self._capture(shape)

    def _capture(self, shape: Shape) -> None:
        sampler, scratch = self._steps.sampler, [self._steps.max_rows]
        self._steps.stage_padding(shape)
        self._seen.add(shape)
        self.compute(shape)
        for temperature in (1.0, 0.0):  # the two common kinds of sampling; the last is how scratch is left
            sampler.join(scratch, [RowSampling(seed=0, temperature=temperature)], [0], [[]], [[]])
            self.sample(shape.entries)
            sampler.leave(scratch)

    def _likely(self) -> Iterator[Shape]:
        """The most useful first, so that little is missing wherever time ends."""
        rows = [b for b in ROWS if b < 2 * self._steps.max_rows]
        doubling = [b for b in rows if b & (b - 1) == 0]
        steps = [Shape(b, b, 0, 0) for b in doubling]
        steps += [Shape(t, 1, 1, 1) for t in TOKENS]
        steps += [Shape(b, b, 0, 0) for b in rows]
        steps += [Shape(t, d, 1, 1) for d in (MIXED_ROWS[0] + 1, self._steps.max_rows) for t in TOKENS if t > d]
        yield from dict.fromkeys(shape for step in steps if (shape := self.fit(step)))

    def compute(self, shape: Shape) -> None:
        """Logits of the staged step, by its graph or kernel by kernel."""
        if shape in self._forward:
            self._forward[shape].replay()
            return

        def forward() -> None:
            logits, rows = self._steps.logits(shape)
            self._logits[: shape.entries].copy_(logits)
            self._rows[: shape.entries].copy_(rows)
            self._group.pipe.flush()  # what a graph begins must end in it

        forward()  # this step's, and it compiles what is recorded next
        if shape in self._seen:
            self._forward[shape], _ = self._record(forward)
        self._seen.add(shape)

    def sample(self, entries: int) -> SamplerOutput:
        """Sampling of the logits; what few requests need (penalties, log-probabilities) runs uncaptured."""
        sampler, logits, rows = self._steps.sampler, self._logits[:entries], self._rows[:entries]
        kind = sampler.graph_key
        if kind is None:
            return sampler.sample(logits, rows)
        if (entries, kind) not in self._sampling:
            output = sampler.sample(logits, rows)
            self._sampling[entries, kind] = self._record(lambda: sampler.sample(logits, rows))
            return output
        captured, output = self._sampling[entries, kind]
        captured.replay()
        return output

    def _record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record on the current stream. `torch.cuda.graph` would also wait, collect garbage and empty the cache."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = function()
        finally:
            graph.capture_end()
        return graph, output
