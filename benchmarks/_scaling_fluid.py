"""A fluid model of many replicas, request by request: between two ticks each replica's step time is constant.

A replica's backlog of prompts is prefilled first come, first served, at the token budget of a step, beside the decode
of every running row; what is left of the tick is decode alone. A row ends after its output tokens. All replicas are
advanced at once (numpy), so that 10^6 requests on 10^3 replicas take seconds.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flover.cluster import policy
from flover.cluster.cost import Batch, Cost

PATIENCE = 30  # seconds of too many replicas before one is given up
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class StepTable:
    """`Cost.step` for arrays: it separates into a part by tokens, one by rows, and two linear ones."""

    def __init__(self, cost: Cost, max_tokens: int, max_rows: int) -> None:
        self._tokens = np.unique(np.concatenate([np.arange(0, 64), np.geomspace(64, max_tokens + max_rows, 200)]))
        self._by_tokens = np.array([cost.step(Batch(prefill=float(n))) for n in self._tokens])
        rows = np.arange(max_rows + 1)
        self._by_rows = np.array([cost.step(Batch(rows=float(n))) for n in rows]) - np.interp(
            rows, self._tokens, self._by_tokens
        )
        zero, one = cost.step(Batch(rows=1.0)), cost.step(Batch(rows=1.0, kv_tokens=1e6))
        self.kv = (one - zero) / 1e6
        self.pair = (cost.step(Batch(prefill=1.0, pairs=1e6)) - cost.step(Batch(prefill=1.0))) / 1e6

    def __call__(self, rows: Floats, kv_tokens: Floats, prefill: Floats, pairs: Floats) -> Floats:
        sampled = np.interp(rows, np.arange(len(self._by_rows)), self._by_rows)
        by_tokens = np.interp(rows + prefill, self._tokens, self._by_tokens)
        return np.asarray(by_tokens + sampled + self.kv * kv_tokens + self.pair * pairs)


@dataclass(slots=True)
class Load:
    """Requests, ascending in arrival. group: whose first `shared` prompt tokens are alike."""

    arrival: Floats
    prompt: Floats
    output: Floats
    group: Ints
    shared: float = 0.0


@dataclass(slots=True)
class Result:
    """Per request, seconds: first and last token. replica of each, hits of the prefix cache."""

    first: Floats
    last: Floats
    replica: Ints
    hits: float = 0.0
    trace: list[tuple[float, int, float, float]] = field(default_factory=list)  # time, replicas, rows, queued tokens


Router = Callable[
    [int, Ints, list[float], Floats], Ints
]  # replicas, groups, replicas' loads, prompts -> a replica each


class Fluid:
    """See the module. `scale(time, active, queued_tokens, rows)` -> replicas wanted, asked each second; a new one works
    after `start_up` seconds, one that is given up finishes what it has.
    """

    def __init__(self, table: StepTable, max_rows: int, budget: int, replicas: int, cached_groups: int = 0) -> None:
        self.table, self.max_rows, self.budget, self.replicas = table, max_rows, budget, replicas
        self.cached_groups = cached_groups

    def run(
        self,
        load: Load,
        router: Router,
        tick: float = 0.02,
        scale: Callable[[float, int, float, float], int] | None = None,
        active: int | None = None,
        start_up: float = 30.0,
    ) -> Result:
        count, size = len(load.arrival), self.replicas
        result = Result(np.zeros(count), np.zeros(count), np.full(count, -1))
        used = np.full((size, int(load.group.max()) + 1), -1, dtype=np.float32) if self.cached_groups else None
        left = load.prompt.copy()  # prompt tokens to compute
        row_id, row_at, row_left, row_len = (np.zeros(0, dtype=k) for k in (int, int, float, float))
        wait_id, wait_at = np.zeros(0, dtype=int), np.zeros(0, dtype=int)
        now, begin, hits = 0.0, 0, 0
        working, coming = (size if active is None else active), list[float]()
        live = np.zeros(size)
        second = evicted = 0.0
        steady = policy.Steady(PATIENCE)
        while begin < count or len(row_id) or len(wait_id):
            end = int(np.searchsorted(load.arrival, now + tick))
            if end == begin and not len(row_id) and not len(wait_id):
                now = max(now + tick, float(load.arrival[begin]) // tick * tick)
                continue
            if end > begin:
                new = np.arange(begin, end)
                queued = np.bincount(wait_at, left[wait_id], minlength=size)
                loads = [policy.load(*pair) for pair in zip(live[:working].tolist(), queued[:working].tolist())]
                at = router(working, load.group[begin:end], loads, load.prompt[begin:end])
                live += np.bincount(at, minlength=size)
                if used is not None:
                    hit = used[at, load.group[begin:end]] >= 0
                    left[new[hit]] = np.maximum(left[new[hit]] - load.shared, 1)
                    hits += int(hit.sum())
                    used[at, load.group[begin:end]] = now + 1
                    if now >= evicted + 1.0:  # each second: what a cache holds too much until then is a few per cent
                        evicted = now
                        self._evict(used)
                result.replica[begin:end] = at
                wait_id, wait_at = np.concatenate([wait_id, new]), np.concatenate([wait_at, at])
                begin = end
            rows = np.bincount(row_at, minlength=size).astype(float)
            kv = np.bincount(row_at, row_len, minlength=size)
            # first come, first served on each replica, as far as there are rows
            order = np.argsort(wait_at, kind="stable")
            wait_id, wait_at = wait_id[order], wait_at[order]
            starts = np.searchsorted(wait_at, np.arange(size))
            place = np.arange(len(wait_at)) - starts[wait_at] if len(wait_at) else wait_at
            fits = place < (self.max_rows - rows)[wait_at]
            admitted = wait_id[fits]
            need = left[admitted]
            sums = np.cumsum(need)
            first = np.searchsorted(wait_at[fits], np.arange(size))
            before = np.concatenate([[0.0], sums])[first]
            ahead = sums - before[wait_at[fits]]  # tokens up to this prompt's end
            backlog = np.bincount(wait_at[fits], need, minlength=size)
            chunk = np.minimum(np.maximum(self.budget - rows, 16), np.maximum(backlog, 1))
            queued = np.bincount(wait_at[fits], minlength=size)
            mean = np.divide(backlog, queued, out=np.ones(size), where=queued > 0)
            mixed = self.table(rows, kv, chunk, chunk * mean / 2)
            plain = self.table(rows, kv, np.zeros(size), np.zeros(size))
            busy = np.minimum(backlog / chunk * mixed, tick)  # seconds with prefill
            steps = busy / mixed + (tick - busy) / plain
            done = busy / mixed * chunk
            # prompts that end in this tick; a request waits for half a step to be seen
            ready = ahead <= done[wait_at[fits]] + 1e-9
            at = wait_at[fits]
            when = now + ahead / chunk[at] * mixed[at]
            new_id, new_at = admitted[ready], at[ready]
            late = 0.5 * np.where(rows[new_at] > 0, plain[new_at], 0.0)
            result.first[new_id] = np.maximum(when[ready], load.arrival[new_id] + mixed[new_at]) + late
            partial = np.maximum(done[at] - (ahead - need), 0)[~ready]
            left[admitted[~ready]] -= np.minimum(partial, left[admitted[~ready]] - 1e-6)
            keep = ~fits
            keep[np.nonzero(fits)[0][~ready]] = True
            wait_id, wait_at = wait_id[keep], wait_at[keep]
            # rows that run: their last token may fall inside the tick
            progress = steps[row_at]
            over = row_left <= progress
            result.last[row_id[over]] = now + tick * row_left[over] / progress[over]
            live -= np.bincount(row_at[over], minlength=size)
            row_left, row_len = row_left - progress, row_len + progress
            alive = ~over
            after = np.maximum(now + tick - np.minimum(when[ready], now + tick), 0) / mixed[new_at]
            still = load.output[new_id] - 1
            row_id, row_at = np.concatenate([row_id[alive], new_id]), np.concatenate([row_at[alive], new_at])
            row_left = np.concatenate([row_left[alive], np.maximum(still - after, 1e-9)])
            row_len = np.concatenate([row_len[alive], load.prompt[new_id] + after])
            now += tick
            if scale is not None and now >= second:
                second += 1.0
                tokens = float(left[wait_id].sum())
                working += sum(at <= now for at in coming)
                coming = [at for at in coming if at > now]
                wanted = scale(now, working, tokens, float(len(row_id)))
                coming += [now + start_up] * (min(wanted, size) - working - len(coming))
                working = min(working, steady(now, wanted))
                result.trace.append((now, working, float(len(row_id)), tokens))
        result.hits = hits / count
        return result

    def _evict(self, used: npt.NDArray[np.float32]) -> None:
        """Least recently used prefixes go."""
        full = np.nonzero(np.count_nonzero(used >= 0, axis=1) > self.cached_groups)[0]
        kept = np.sort(used[full], axis=1)[:, -self.cached_groups]
        used[full] = np.where(used[full] < kept[:, None], -1, used[full])


# ---- routers ---------------------------------------------------------------------------------------------------------


def round_robin() -> Router:
    turn = [0]

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        turn[0] += len(groups)
        return np.arange(turn[0] - len(groups), turn[0]) % active

    return route


def least_loaded() -> Router:
    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        heap = [(load, i) for i, load in enumerate(loads)]
        heapq.heapify(heap)
        at = np.empty(len(groups), dtype=int)
        for n in range(len(groups)):
            load, at[n] = heap[0]
            heapq.heapreplace(heap, (load + adds[n], int(at[n])))
        return at

    return route


def power_of_two_choices(seed: int = 0) -> Router:
    rng = random.Random(seed)

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        at = np.empty(len(groups), dtype=int)
        for n in range(len(groups)):
            at[n] = chosen = policy.power_of_two(loads, rng)
            loads[chosen] += adds[n]
        return at

    return route


def prefix_affinity(homes: Sequence[Sequence[int]], seed: int = 0) -> Router:
    """homes: of each group."""
    rng = random.Random(seed)

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        at = np.empty(len(groups), dtype=int)
        mean = sum(loads) / len(loads)
        for n, group in enumerate(groups.tolist()):
            at[n] = chosen = policy.choose(loads, homes[group], mean, rng)
            loads[chosen] += adds[n]
        return at

    return route
