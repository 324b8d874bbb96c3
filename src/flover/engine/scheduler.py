"""The scheduler: decides each step who runs how many tokens, who moves and who leaves (who joins: `admission`).

Source: the paper's work scheduler (docs/architecture.md, "The loop"). Invariants, after every `schedule`:
live rows are exactly `[0, len(rows))` (with frozen rows among them only under reorder "off" and policy "static");
counts are optimistic: `computed` grows when a token is scheduled, so a plan can be made while another is in flight;
nothing is scheduled past max_tokens or the model's length, so only EOS, stop strings, NaN and aborts arrive late, and
what such a row held is reused only by plans made after that became known. Plain Python and numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flover.config import KVConfig, SchedulerConfig
from flover.engine.admission import Admission, Table, check_size
from flover.engine.batch import BatchPlan, IntArray, RowJoin, StepResult
from flover.engine.policy import Policy
from flover.engine.rows import Lengths, RowTable
from flover.engine.step import Step, StepOutput, record_rows, take_in
from flover.kv.protocol import KVLayout
from flover.metrics import StepStats
from flover.request import FinishReason, Request, RequestStatus


class Scheduler:
    """See the module. `clock` gives seconds; `kv` is the layout's host allocator.

    Requests enter by `add`, end by `update` (stop ids, length, NaN), `finish` (caller, stop string) or `rewind`.
    """

    def __init__(self, config: SchedulerConfig, kv_config: KVConfig, kv: KVLayout, clock: Callable[[], float]) -> None:
        self.config, self.kv, self.clock, self._kv_config = config, kv, clock, kv_config
        self.policy = Policy(config.policy, config.order)
        self.record_rows = config.record_timeline  # may be turned on and off between steps
        self.paged = kv_config.layout == "paged"
        self.token_bytes, self.debug_poison = kv_config.bytes_per_token, kv_config.debug_poison
        self.requests: dict[str, Request] = {}  # live, by request_id
        self.table = RowTable(config.max_num_seqs)
        self.admission = Admission(config, kv_config, kv, self.policy, self.table, clock)
        self._departing: list[Request] = []  # rows whose request is over, or preempted
        self._complete: list[Request] = []  # rows whose every token is scheduled
        self._short: list[tuple[int, int, Request]] = []  # rows whose blocks are full: arrival, tokens computed
        self._finished: list[Request] = []  # to report with the next output
        self._arrivals = 0
        self._num_grammars = 0  # live requests whose draws are masked
        self._steps = 0
        self._disturbed = 0  # steps before this one may hold rows that have ended or been preempted since
        self._last_was_prefill = False

    # ---- the caller's side -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: a live request has that id, or the request could never fit.
        """
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is already running")
        self.check(request)
        request.arrival, request.key = self._arrivals, str(self._arrivals)
        self._arrivals += 1
        self._num_grammars += bool(request.grammar)
        self.requests[request.request_id] = request
        self.admission.push(request)

    def check(self, request: Request) -> None:
        """See `check_size`."""
        check_size(request, self.config, self._kv_config)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live request from outside: abort, or a stop string found in its text. Unknown ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, reason, stop_reason)

    def fail(self, request: Request, error: str) -> None:
        """End a live request with an error of its own."""
        if not request.finished:
            request.error = error
            self._finish(request, FinishReason.ERROR)

    def has_unfinished(self) -> bool:
        return bool(self.requests or self._departing or self._finished)

    @property
    def drained(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.requests and not self.table.requests

    def drain_finished(self) -> list[Request]:
        """Requests that ended with no step to report them (aborted while nothing ran)."""
        finished, self._finished = self._finished, []
        return finished

    # ---- schedule ----------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next plan, or None when there is nothing to do until a result comes back."""
        started = self.clock()
        if not self.table.requests and not self.admission.waiting:
            return None
        before = list(self.table.requests) if self.record_rows else []
        # the host knows the end of a row at its limit without seeing the token
        self._departing += [request for request in self._complete if not request.finished]
        tables: list[Table] = []
        self._grow(tables)
        self._complete, self._short = [], []
        moves, leaves, relocations, frozen = self._leave(tables)
        under_way = (self.table.computed < self.table.prefill).nonzero()[0]
        chunks: dict[int, int] = {}
        joins: list[RowJoin] = []
        if self._is_prefill_step(under_way):
            chunks, joins = self.admission.prefill_rows(under_way, tables, moves)
        scheduled = self._scheduled(under_way, chunks)
        if not (np.count_nonzero(scheduled) or leaves or frozen or moves):
            return None
        freed = self.kv.drain_freed()
        ids, scored, pooled = self.admission.prefill_ids(chunks)
        plan = BatchPlan(
            step=self._steps,
            num_rows=len(self.table),
            num_scheduled=scheduled.tobytes(),
            prefill_ids=np.array(ids, dtype=np.int32).tobytes() if ids else b"",
            moves=moves,
            freed=freed if self.debug_poison else [],
            leaves=leaves,
            relocations=relocations,
            frozen=frozen,
            joins=joins,
            scored=scored,
            pooled=pooled,
            tables=[(request.row, start, blocks) for request, start, blocks in tables if request.row >= 0],
            reserved_blocks=self.kv.num_reserved_blocks,
            masked=self._num_grammars > 0,
        )
        self._steps += 1
        return self._advance(plan, scheduled, chunks, before, started)

    def _grow(self, tables: list[Table]) -> None:
        """Blocks for decode rows at their capacity, oldest first; when they run out the youngest row is preempted."""
        if not self._short:
            return
        short = sorted(self._short)
        leaving = {request.arrival for request in self._departing}
        extend = self.kv.extend
        rows: list[int] = []
        capacities: list[int] = []
        for arrival, computed, request in short:
            while arrival not in leaving:
                grant = extend(request.key, computed + 1)
                if grant is not None:
                    rows.append(request.row)
                    capacities.append(grant.capacity)
                    tables.append((request, grant.start, grant.block_ids))
                    break
                victim = self._youngest(leaving)
                self._preempt(victim)
                leaving.add(victim.arrival)
        self.table.bound(rows, capacities)

    def _youngest(self, leaving: set[int]) -> Request:
        candidates = [r for r in self.table.requests if r.arrival not in leaving and not self.table.dead[r.row]]
        assert candidates, "the row that needs a block is itself a candidate"
        return max(candidates, key=lambda r: r.arrival)

    def _preempt(self, request: Request) -> None:
        """Give its memory up and queue it again; tokens still in flight for it stay valid and are awaited first."""
        self._disturbed = self._steps
        request.num_preemptions += 1
        request.num_in_flight = max(0, int(self.table.computed[request.row]) + 1 - len(request.token_ids))
        # memory is free at once: the row's last plan runs before any plan that reuses it
        self._give_back(request)
        self._departing.append(request)
        self.admission.requeue(request)

    def _leave(
        self, tables: list[Table]
    ) -> tuple[list[tuple[int, int, int]], list[int], list[tuple[int, int]], list[int]]:
        """Departing rows give their memory back, the layout reorders, rows close up.

        Returns moves, leaves, relocations and newly frozen rows, as in `BatchPlan`.
        """
        if not self._departing:
            return [], [], [], []
        departing, self._departing = self._departing, []
        over = [request for request in departing if request.status is not RequestStatus.PREEMPTED]
        if self.policy.holds_rows:  # nobody leaves before the last of the batch
            dead = [request for request in self.table.requests if self.table.dead[request.row]]
            over = over + dead if len(departing) + len(dead) == len(self.table) else []
        for request in over:
            self._give_back(request)
        reordering = self.kv.reorder(Lengths(self.table))
        by_key = {request.key: request for request in self.table.requests}
        tables.extend((by_key[key], 0, [slot]) for key, slot in reordering.relocated.items())
        leaves = sorted(by_key[key].row for key in reordering.evicted)
        relocations = self.table.remove(leaves)
        frozen = sorted(request.row for request in departing if request.row >= 0)
        self.table.freeze(frozen)
        return [(m.src, m.dst, m.num_tokens) for m in reordering.moves], leaves, relocations, frozen

    def _give_back(self, request: Request) -> None:
        """Its blocks are free, and those full of known tokens can be found again, unless their contents are bad."""
        bad = request.finish_reason is FinishReason.ERROR
        if not bad:
            known = min(int(self.table.computed[request.row]), len(request.token_ids))
            self.kv.commit(request.key, request.token_ids, known)
        self.kv.leave(request.key, bad)

    def _is_prefill_step(self, under_way: IntArray) -> bool:
        """Mixed, overlap: always. Separate: prefill and decode alternate while there is work for both."""
        if self.config.prefill_mode != "separate":
            return True
        decoding = under_way.size < np.count_nonzero(self.table.dead == 0)
        if decoding and self._last_was_prefill:
            return False
        return under_way.size > 0 or not decoding or self.admission.can_admit()

    def _scheduled(self, under_way: IntArray, chunks: dict[int, int]) -> npt.NDArray[np.int32]:
        """Tokens per row: its prefill chunk; one if it decodes or is frozen, unless this step is for prefill alone."""
        decode = self.config.prefill_mode != "separate" or not chunks
        scheduled = np.full(len(self.table), decode, dtype=np.int32)
        if under_way.size:
            scheduled[under_way] = 0
        if chunks:
            scheduled[list(chunks)] = list(chunks.values())
        return scheduled

    def _advance(
        self,
        plan: BatchPlan,
        scheduled: npt.NDArray[np.int32],
        chunks: dict[int, int],
        before: list[Request],
        started: float,
    ) -> Step:
        """Optimistic bookkeeping once the plan stands: counts, who samples, who is at an edge, statistics."""
        table, k = self.table, plan.num_rows
        computed, prefill, dead = table.computed, table.prefill, table.dead
        num_dead, num_prefill = int(np.count_nonzero(dead)), sum(chunks.values())
        num_scheduled = num_advanced = int(scheduled.sum())
        rows, sampled, token_ids, stop_ids = list(table.requests), table.requests, table.token_ids, table.stop_ids
        prefilling = (computed < prefill) & (dead == 0) if self.record_rows else None
        advanced = scheduled
        if num_dead:
            advanced = scheduled * (dead == 0)
            num_advanced = int(advanced.sum())
        if self.admission.waiting.shares:
            decoded = advanced * (computed >= prefill)
            self.admission.waiting.charge_outputs(np.bincount(table.client, weights=decoded).tolist())
        computed += advanced
        edge = (computed >= table.edge).nonzero()[0]
        last: list[int] = []
        for row, length, limit in zip(edge.tolist(), computed[edge].tolist(), table.limit[edge].tolist()):
            if length < limit:
                self._short.append((rows[row].arrival, length, rows[row]))
            else:
                last.append(row)
        self._complete = [rows[row] for row in last]
        first: list[Request] = []
        if chunks or num_advanced < k:  # else every row decodes
            which = ((advanced > 0) & (computed >= prefill)).nonzero()[0]
            place = {row: i for i, row in enumerate(which.tolist())}
            sampled, token_ids, stop_ids = [rows[i] for i in place], [token_ids[i] for i in place], stop_ids[:, which]
            last = [place[row] for row in last]
            for row in sorted(chunks):
                self.kv.commit(rows[row].key, rows[row].token_ids, int(computed[row]))
                if row in place:
                    first.append(rows[row])
        self._last_was_prefill = num_prefill > 0
        stats = StepStats(
            step=plan.step,
            start=started,
            num_running=k - num_dead,
            num_waiting=self.admission.num_waiting,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_advanced - num_prefill,
            num_dead_rows=num_scheduled - num_advanced,
            kv_used_bytes=int(computed.sum()) * self.token_bytes,
            kv_reserved_bytes=self._reserved_bytes(),
            kv_moved_bytes=sum(move[2] for move in plan.moves) * self.token_bytes,
        )
        if prefilling is not None:
            stats.prefilling, stats.dead = prefilling.tolist(), (dead == 1).tolist()
            record_rows(stats, plan, rows, before)
        return Step(plan, rows, list(sampled), list(token_ids), stop_ids.copy(), last, first, stats)

    def _reserved_bytes(self) -> int:
        blocks = self.kv.num_used_blocks if self.paged else self.kv.num_reserved_blocks
        return blocks * self.kv.block_size * self.token_bytes

    # ---- update ------------------------------------------------------------------------------------------------------

    def update(self, step: Step, result: StepResult) -> StepOutput:
        """Append the tokens of a step's result and end the requests that it ends.

        A request that ended while this step was in flight (EOS in the step before, an abort) has its token dropped.
        """
        now = step.stats.end = self.clock()
        self.admission.observe(step.stats)
        for request in step.first:
            if not request.num_output_tokens:
                request.first_token_time = now
        output, endings = take_in(step, result, disturbed=step.plan.step < self._disturbed)
        for ending in endings:
            self._finish(*ending)
        output.finished = self.drain_finished()
        return output

    def _finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if request.status is not RequestStatus.RUNNING:
            self.admission.num_waiting -= 1
        elif request.row >= 0 and not self.table.dead[request.row]:
            self._departing.append(request)
        elif reason is FinishReason.ERROR:
            self.kv.reset_cache()  # it has left already, and its blocks may hold the NaN
        self._disturbed = self._steps
        request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason
        request.finish_time = request.last_token_time = self.clock()
        del self.requests[request.request_id]
        self._num_grammars -= bool(request.grammar)
        self._finished.append(request)

    # ---- failure -----------------------------------------------------------------------------------------------------

    def take_smaller_steps(self, failed: Step) -> bool:
        """A step was too large for the device's memory: halve the token budget and start over; False: it is no use."""
        if not self.admission.take_smaller_steps(failed.stats.num_prefill_tokens):
            return False
        self.rewind(failed, None)
        return True

    def rewind(self, failed: Step, message: str | None) -> None:
        """A step failed on the device, and the plans after it were cancelled: go back to what is confirmed.

        Requests that the failed step computed end with an error `message`, if there is one; the others lose their
        cached tokens and are queued again (recomputed to the same tokens). The device forgets all rows.
        """
        if message is not None:
            for request, count in zip(failed.rows, failed.plan.scheduled()):
                if count:
                    self.fail(request, message)
        self._departing, self._complete, self._short = [], [], []
        for request in self.table.requests:
            if not self.table.dead[request.row] or self.policy.holds_rows:  # else it gave its slot back already
                self.kv.leave(request.key, True)
            if not request.finished:
                self.admission.requeue(request)
        for request in self.requests.values():
            request.num_in_flight = 0
        self.kv.reset_cache()
        self.kv.reorder({})
        self.table.remove(list(range(len(self.table))))

    def fail_all(self, message: str) -> None:
        """Nothing can run any more: end every request with an error; after `rewind`, while nobody is in the batch."""
        for request in list(self.requests.values()):
            self.fail(request, message)
