"""A step on the host: the plan and who it is for, and how a result's tokens are taken in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flover.engine.batch import BatchPlan, IntArray, Scores, StepResult
from flover.metrics import StepStats
from flover.request import NOTHING_LEFT, FinishReason, Logprob, Request, RequestStatus, TokenLogprobs


@dataclass(slots=True)
class Step:
    """A plan and the host's memory of it: who gets the tokens that come back."""

    plan: BatchPlan
    rows: list[Request]  # snapshot: row -> request
    sampled: list[Request]  # in row order: one token each
    token_ids: list[list[int]]  # theirs, to append to
    stop_ids: IntArray  # [most stop ids, num_sampled], -1: none
    last: list[int]  # indices into sampled: this token reaches the request's limit
    first: list[Request]  # those whose prefill this step completes
    stats: StepStats


@dataclass(slots=True)
class StepOutput:
    """What a step gave: one new token for each of `requests`; `finished` ended in it, with or without a token."""

    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    stats: StepStats | None = None


class Ending(NamedTuple):
    """A request that a result ends."""

    request: Request
    reason: FinishReason
    stop_reason: int | None = None


NOT_FINITE = "the model produced no finite logits to sample from (NaN)"


def take_in(step: Step, result: StepResult, disturbed: bool) -> tuple[StepOutput, list[Ending]]:
    """Append a result's tokens to their requests; who ends by it.

    disturbed: some request may have ended or been preempted since the step was planned. The token of one that ended
    is dropped; that of a preempted one counts.
    """
    tokens: list[int] = result.token_ids.tolist()
    for (row, start, _, ids), scores in zip(step.plan.scored, result.prompt_scores):
        _add_prompt_logprobs(step.rows[row], start, ids, scores)
    for (row, start, mean), vector in zip(step.plan.pooled, result.pooled):
        _add_pooled(step.rows[row], vector, mean and start > 0)
    over: set[int] = set()
    endings: list[Ending] = []
    output = StepOutput(step.sampled, tokens, stats=step.stats)
    late = disturbed and any(request.status is not RequestStatus.RUNNING for request in step.sampled)
    if late or result.logprobs is not None or not result.finite.all():
        output = StepOutput(stats=step.stats)
        for i, (request, token) in enumerate(zip(step.sampled, tokens)):
            if request.finished or not result.finite[i]:
                over.add(i)
            if not request.finished:
                _take_one(request, token, i, result, output, endings)
    else:
        deque(map(list.append, step.token_ids, tokens), maxlen=0)
    stops = step.stop_ids == result.token_ids
    for i in stops.any(0).nonzero()[0].tolist() if stops.any() else ():
        if i not in over:
            over.add(i)
            request, token = step.sampled[i], tokens[i]
            reported = None if token in request.eos_token_ids else token
            endings.append(Ending(request, FinishReason.STOP, reported))
    endings += [Ending(step.sampled[i], FinishReason.LENGTH) for i in step.last if i not in over]
    return output, endings


def _take_one(
    request: Request, token: int, i: int, result: StepResult, output: StepOutput, endings: list[Ending]
) -> None:
    """The uncommon step, row by row: preempted rows, NaN rows, log-probabilities."""
    request.num_in_flight = max(0, request.num_in_flight - 1)
    if not result.finite[i]:
        exhausted = result.exhausted is not None and result.exhausted[i]
        request.error = NOTHING_LEFT if exhausted else NOT_FINITE
        endings.append(Ending(request, FinishReason.ERROR))
        return
    if result.logprobs is not None and request.logprobs is not None:
        request.logprobs.append(_token_logprobs(token, result.logprobs, i, request.sampling.logprobs))
        request.cumulative_logprob += float(result.logprobs.chosen[i])
    request.token_ids.append(token)
    output.requests.append(request)
    output.token_ids.append(token)


def _add_prompt_logprobs(request: Request, start: int, ids: list[int], scores: Scores) -> None:
    """Scores of the tokens at start + 1 ...; a chunk from before a preemption may come late, and come again."""
    known = request.prompt_logprob_list or [None]  # nothing precedes the first token
    if request.status is RequestStatus.RUNNING and len(known) > start:
        scored = [_token_logprobs(token, scores, i, request.prompt_logprobs) for i, token in enumerate(ids)]
        request.prompt_logprob_list = [*known[: start + 1], *scored]


def _add_pooled(request: Request, vector: npt.NDArray[np.float32], add: bool) -> None:
    """A chunk's part of an embedding; one from before a preemption is overwritten by the recomputation's first."""
    known = np.frombuffer(request.embedding, dtype=np.float32) if add and request.embedding else 0
    request.embedding = (vector + known).tobytes()


def _token_logprobs(token: int, scores: Scores, i: int, count: int) -> TokenLogprobs:
    """`count` best tokens by rank, and the chosen one if it is not among them."""
    best = zip(scores.top_ids[i, :count].tolist(), scores.top[i, :count].tolist())
    entry = {t: Logprob(p, rank) for rank, (t, p) in enumerate(best, 1)}
    entry[token] = Logprob(float(scores.chosen[i]), int(scores.rank[i]))
    return entry


def record_rows(stats: StepStats, plan: BatchPlan, rows: list[Request], before: list[Request]) -> None:
    """The part of a step's statistics that only a timeline needs; `before`: rows ahead of this step's leaves."""
    stats.rows = [request.request_id for request in rows]
    stats.num_scheduled = plan.scheduled().tolist()
    stats.joins = [(join.row, rows[join.row].request_id, join.num_computed_tokens) for join in plan.joins]
    for row in plan.leaves:
        request = before[row]
        reason = "preempted" if request.status is RequestStatus.PREEMPTED else "length"
        if request.finish_reason is not None:
            reason = request.finish_reason.value
        stats.leaves.append((row, request.request_id, reason))
        if reason == "preempted":
            stats.preempted.append(request.request_id)
    stats.relocations, stats.moves = plan.relocations, plan.moves
