"""Who joins the batch, and the prefill of a step: the requests that wait, and how many tokens each row computes ahead.

The scheduler asks for it once a step; the cost is per request that joins or is under way, nothing per decode row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from flover.config import KVConfig, SchedulerConfig
from flover.engine.batch import IntArray, RowJoin
from flover.engine.cost import StepCost
from flover.engine.policy import Policy
from flover.engine.queue import WaitingQueue
from flover.engine.rows import RowTable
from flover.kv.protocol import Grant, KVLayout
from flover.metrics import StepStats
from flover.request import ContextLengthError, Request, RequestStatus

MIN_BUDGET = 64  # tokens; a step of fewer that does not fit will not fit at all
logger = logging.getLogger("flover")

Table = tuple[Request, int, list[int]]  # (who, first entry, block ids)


def max_computed(request: Request) -> int:
    """Tokens computed in all: the last output is sampled, never computed."""
    return request.num_prompt_tokens + request.max_output_tokens - 1


def check_size(request: Request, config: SchedulerConfig, kv: KVConfig) -> None:
    """ValueError if a request could never run: too long for the context, or for the cache (what fits is said)."""
    prompt, tokens, context = request.num_prompt_tokens, max_computed(request), config.max_model_len
    if tokens > context:
        raise ContextLengthError(f"a prompt of {prompt} tokens is longer than the context of {context}")
    if tokens > kv.room:
        fits = f"max_tokens={kv.room - prompt + 1} would" if prompt <= kv.room else "the prompt alone cannot"
        raise ValueError(
            f"{prompt} prompt tokens and up to {request.max_output_tokens} output tokens can never fit "
            f"the KV cache of {kv.room} tokens; {fits}"
        )


class Admission:
    """Requests without a row, and the prefill of those that have one.

    Args:
        table: the running batch; who joins is appended to it.
        clock: seconds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_config: KVConfig,
        kv: KVLayout,
        policy: Policy,
        table: RowTable,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._kv, self._policy, self._table, self._clock = config, kv, policy, table, clock
        self._paged, self._prefix_caching = kv_config.layout == "paged", kv_config.prefix_caching
        self.waiting = WaitingQueue(policy)
        self.num_waiting = 0  # live requests without a row; in `waiting` may be others, which have ended
        self._filling = False  # the last step that let requests join had no tokens for all who wait
        self._token_budget = config.max_num_batched_tokens
        self._cost = StepCost(config.itl_budget / 1e3) if config.itl_budget is not None else None
        self._last_end = 0.0  # of a step, on the clock

    def push(self, request: Request) -> None:
        """A new request."""
        self.num_waiting += 1
        self.waiting.push(request)

    def requeue(self, request: Request) -> None:
        """Back to the queue, at its place of arrival, to be computed anew from its known tokens."""
        request.status = RequestStatus.PREEMPTED
        if len(request.prompt_logprob_list or ()) < request.num_prompt_tokens:
            request.prompt_logprob_list = None  # scored in part: the recomputation scores them all
        self.num_waiting += 1
        self.waiting.put_back(request)

    def can_admit(self) -> bool:
        """Somebody waits, and may join now if there is memory."""
        return bool(self.waiting) and self._places() > 0

    def prefill_rows(
        self, under_way: IntArray, tables: list[Table], moves: list[tuple[int, int, int]]
    ) -> tuple[dict[int, int], list[RowJoin]]:
        """Prefill chunks (row -> tokens) within the budget: rows under way first, then everyone who fits joins."""
        if not under_way.size and not self.waiting:
            self._filling = False
            return {}, []
        budget = self._token_budget
        if self._config.prefill_mode != "separate":
            budget -= len(self._table) - under_way.size
        if self._cost is not None and len(self._table) > under_way.size:
            budget = min(budget, self._cost.prefill_tokens(len(self._table) - under_way.size))
        budget = max(budget, min(self._kv.block_size, 16))  # decode never starves prefill
        chunks: dict[int, int] = {}
        for row in under_way[np.argsort(self._table.arrival[under_way])].tolist() if under_way.size else ():
            chunk = min(int(self._table.prefill[row] - self._table.computed[row]), budget)
            if chunk:
                chunks[row] = chunk
                budget -= chunk
        joins: list[RowJoin] = []
        skipped: list[Request] = []
        places = self._places()
        while self.waiting and places > 0 and budget > 0:
            request = self.waiting.pop()
            if request is None:
                break
            if not self._ready(request):
                skipped.append(request)
                continue
            grant = self._place(request)
            if grant is None:
                skipped.append(request)
                break
            joins.append(self._join(request, grant, tables))
            moves.extend((copy.src, copy.dst, copy.num_tokens) for copy in grant.copies)
            chunk = min(len(request.token_ids) - grant.num_cached_tokens, budget)
            budget -= chunk
            places -= 1
            chunks[request.row] = chunk
        self._filling = budget <= 0 < places and bool(self.waiting)
        for request in skipped:
            self.waiting.put_back(request)
        return chunks, joins

    def _places(self) -> int:
        return self._policy.admissible(len(self._table), self._config.max_num_seqs, self._filling)

    def _ready(self, request: Request) -> bool:
        """Not while tokens are in flight for it, while its grammar or the prompt it may share is still computed."""
        sibling = request.sibling
        if request.num_in_flight or (request.matcher is not None and not request.matcher.ready):
            return False
        if sibling is None or sibling.row < 0 or sibling.status is not RequestStatus.RUNNING:
            return True
        return bool(self._table.computed[sibling.row] >= sibling.num_prompt_tokens)

    def _place(self, request: Request) -> Grant | None:
        """Memory for a request's known tokens, with a block to spare for each running row, so that none thrashes."""
        sibling = request.sibling
        share = self._prefix_caching and request.prompt_logprobs < 0 and not request.pooling
        if (
            share
            and sibling
            and sibling.row >= 0
            and not request.num_output_tokens
            and not self._table.dead[sibling.row]
        ):
            grant = self._kv.fork(sibling.key, request.key, request.num_prompt_tokens)
            if grant is not None:
                return grant
        headroom = len(self._table) if self._paged else 0
        return self._kv.join(
            request.key, request.token_ids, salt=request.cache_salt, use_cache=share, headroom=headroom
        )

    def _join(self, request: Request, grant: Grant, tables: list[Table]) -> RowJoin:
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = grant.num_cached_tokens
            request.first_scheduled_time = self._clock()
            self.waiting.charge_prompt(request)
        request.status = RequestStatus.RUNNING
        self.num_waiting -= 1
        cached, known = grant.num_cached_tokens, len(request.token_ids)
        client = self.waiting.number(request)
        self._table.append(
            request, computed=cached, limit=max_computed(request), capacity=grant.capacity, client=client
        )
        tables.append((request, grant.start, grant.block_ids))
        prompt = request.num_prompt_tokens
        history = (request.token_ids[:prompt], request.token_ids[prompt:]) if request.sampling.needs_history else None
        return RowJoin(request.row, prompt, known, cached, request.sampling, history, request.arrival)

    def prefill_ids(
        self, chunks: dict[int, int]
    ) -> tuple[list[int], list[tuple[int, int, int, list[int]]], list[tuple[int, int, bool]]]:
        """Ids of the scheduled prefill tokens, rows in order; and a plan's `scored` and `pooled`."""
        ids: list[int] = []
        pooled: list[tuple[int, int, bool]] = []
        scored: list[tuple[int, int, int, list[int]]] = []
        for row, chunk in sorted(chunks.items()):
            request = self._table.requests[row]
            start = int(self._table.computed[row])
            end, prompt = start + chunk, request.num_prompt_tokens
            ids += request.token_ids[start:end]
            if request.pooling:
                pooled.append((row, start, request.pooling == "mean"))
            if request.prompt_logprobs >= 0 and len(request.prompt_logprob_list or ()) < prompt:
                scored.append(
                    (row, start, request.prompt_logprobs, request.token_ids[start + 1 : min(end + 1, prompt)])
                )
        return ids, scored, pooled

    def observe(self, stats: StepStats) -> None:
        """A step has ended: what it took bounds the prefill of those to come, if gaps between tokens have a budget."""
        if self._cost is not None:  # planned ahead, it began when the one before it ended
            seconds = stats.end - max(stats.start, self._last_end)
            self._cost.observe(stats.num_decode_tokens, stats.num_prefill_tokens, seconds)
            self._last_end = stats.end

    def take_smaller_steps(self, tokens: int) -> bool:
        """A step of so many prompt tokens was too large for the device's memory: halve the budget; False: no use."""
        if tokens <= MIN_BUDGET:
            return False
        self._token_budget = max(min(tokens, self._token_budget) // 2, MIN_BUDGET)
        logger.warning("a step of %d prompt tokens ran out of memory; now at most %d", tokens, self._token_budget)
        return True
