"""`BatchPlan`: what one step does, complete and torch-free; and `StepResult`: what came of it.

Every rank applies the same plan and holds no allocator of its own. Order of effect on the device:
poison, moves, leaves, relocations, frozen, joins, tables, forward, masks, sampling. Row numbers in `leaves` are those
before relocation, everywhere else those after. Arrays travel as bytes: a plan is a few kilobytes and encodes in
microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from flover.request import RowSampling

IntArray = npt.NDArray[np.int64]


class RowJoin(msgspec.Struct, frozen=True, array_like=True):
    """A request that enters the batch (first time or after preemption) and all that its row must know."""

    row: int
    num_prompt_tokens: int
    num_prefill_tokens: int  # prompt + outputs known so far: what prefill must compute
    num_computed_tokens: int  # already in the cache (prefix reuse)
    sampling: RowSampling
    history: tuple[list[int], list[int]] | None = None  # prompt ids, output ids; only if sampling.needs_history
    request: int = 0  # its number by arrival


class BatchPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step.

    num_scheduled: int32 `[num_rows]`; a row in prefill takes that many of `prefill_ids`, a decode row its last token.
    frozen: rows whose request is over but which stay in the batch (reorder off, policy static): they compute their last
        position again, write nothing that counts and sample nothing.
    scored: (row, its first position, best wanted, prompt ids that follow each of its scheduled tokens) where
        prompt_logprobs are wanted.
    pooled: (row, its first position, whether all its tokens count or the last alone) where an embedding is wanted.
    """

    step: int
    num_rows: int
    num_scheduled: bytes
    prefill_ids: bytes = b""  # int32, rows in order
    moves: list[tuple[int, int, int]] = []  # (src block, dst block, live tokens)
    freed: list[int] = []  # blocks to poison in debug mode
    leaves: list[int] = []
    relocations: list[tuple[int, int]] = []  # (src row, dst row), simultaneous
    frozen: list[int] = []
    scored: list[tuple[int, int, int, list[int]]] = []
    pooled: list[tuple[int, int, bool]] = []
    joins: list[RowJoin] = []
    tables: list[tuple[int, int, list[int]]] = []  # (row, first entry, block ids)
    reserved_blocks: int = 0
    masked: bool = False  # sampling waits for `RowMasks`

    def scheduled(self) -> npt.NDArray[np.int32]:
        return np.frombuffer(self.num_scheduled, dtype=np.int32)


class RowMasks(msgspec.Struct, frozen=True, array_like=True):
    """Which tokens the sampled rows of a masked plan may draw, where a grammar says so.

    bits: int32 `[len(rows), ceil(vocabulary / 32)]`, the lowest bit first; 1 is allowed.
    """

    rows: list[int]
    bits: bytes


class Scores(NamedTuple):
    """Log-probabilities of n tokens under the raw logits, and the best tokens at each place."""

    chosen: npt.NDArray[np.float32]  # [n]
    rank: IntArray  # [n], 1 is the best
    top_ids: IntArray  # [n, k]
    top: npt.NDArray[np.float32]  # [n, k]


class StepResult(NamedTuple):
    """Per sampled row, in row order; `prompt_scores` per entry of the plan's `scored`, `pooled` of its `pooled`."""

    token_ids: IntArray
    finite: npt.NDArray[np.bool_]
    logprobs: Scores | None = None
    prompt_scores: tuple[Scores, ...] = ()
    pooled: tuple[npt.NDArray[np.float32], ...] = ()  # [hidden_size]
    exhausted: npt.NDArray[np.bool_] | None = None  # not finite because every token is masked; None: none is


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BatchPlan)
_mask_decoder = msgspec.msgpack.Decoder(RowMasks)


def encode_plan(plan: BatchPlan) -> bytes:
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> BatchPlan:
    return _decoder.decode(data)


def encode_masks(masks: RowMasks) -> bytes:
    return _encoder.encode(masks)


def decode_masks(data: bytes) -> RowMasks:
    return _mask_decoder.decode(data)
