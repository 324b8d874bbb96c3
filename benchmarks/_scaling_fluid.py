"""A fluid model of many replicas, request by request: what runs is looked at once a tick, on all replicas at once.

Steps with prompts are told one by one, since TTFT is made of them: a prompt waits for the end of the step that runs
when it comes, then all that have come share one step, first come, first served, up to its tokens. Between them decode
is fluid: steps of one length, which changes from tick to tick, and rows leave between ticks. numpy over all replicas,
so that 10^6 requests on 10^3 replicas take seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from _scaling_routers import Router
from _scaling_rows import Floats, Ints, Rows, StepTable, Waiting

from flover.cluster import policy

PATIENCE = 30  # seconds of too many replicas before one is given up
Scale = Callable[[float, int, float, float], int]  # time, replicas that work, queued tokens, rows -> replicas wanted


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


class Fluid:
    """See the module. cached_groups: prefixes that a replica's cache holds; 0: it has none."""

    def __init__(self, table: StepTable, max_rows: int, budget: int, replicas: int, cached_groups: int = 0) -> None:
        self.table, self.max_rows, self.budget, self.replicas = table, max_rows, budget, replicas
        self.cached_groups = cached_groups

    def run(self, load: Load, router: Router, tick: float = 0.02, scaling: Scaling | None = None) -> Result:
        """Serve a load. tick: seconds."""
        count, size = len(load.arrival), self.replicas
        result = Result(np.zeros(count), np.zeros(count), np.full(count, -1))
        rows, live = Rows(self.table, size), np.zeros(size)
        waiting = Waiting(load.arrival, load.prompt, self.max_rows, self.budget)
        cache = _Prefixes(size, int(load.group.max()) + 1, self.cached_groups) if self.cached_groups else None
        now, begin = 0.0, 0
        while begin < count or len(rows.ids) or len(waiting.ids):
            end = int(np.searchsorted(load.arrival, now + tick))
            if end == begin and not len(rows.ids) and not len(waiting.ids):
                now = max(now + tick, float(load.arrival[begin]) // tick * tick)
                continue
            if end > begin:
                new, groups = np.arange(begin, end), load.group[begin:end]
                working = scaling.working if scaling else size
                queued = np.bincount(waiting.at, waiting.left[waiting.ids], minlength=size)
                loads = [policy.load(*pair) for pair in zip(live[:working].tolist(), queued[:working].tolist())]
                result.replica[begin:end] = at = router(working, groups, loads, load.prompt[begin:end])
                live += np.bincount(at, minlength=size)
                if cache is not None:
                    hit = new[cache.use(at, groups, now)]
                    waiting.left[hit] = np.maximum(waiting.left[hit] - load.shared, 1)
                waiting.add(new, at)
                begin = end
            rows.begin(now)
            now += tick
            while len(waiting.ids) and (ended := waiting.step(rows, now)) is not None:
                ids, at = ended
                result.first[ids] = rows.anchor[at]
                rows.join(ids, at, load.prompt[ids], load.output[ids])
            ids, at, last = rows.end(now)
            result.last[ids] = np.maximum(last, result.first[ids])
            live -= np.bincount(at, minlength=size)
            if scaling:
                scaling.tick(now, float(len(rows.ids)), float(waiting.left[waiting.ids].sum()))
        result.hits = cache.hits / count if cache else 0.0
        result.trace = scaling.trace if scaling else []
        return result


class Scaling:
    """Asks `scale` each second how many replicas are wanted; a new one works after `start_up` seconds, one that is
    given up finishes what it has.

    Args:
        replicas: there can be. working: at the begin.
    """

    def __init__(self, scale: Scale, replicas: int, working: int, start_up: float) -> None:
        self._scale, self._replicas, self._start_up = scale, replicas, start_up
        self.working, self._coming = working, list[float]()
        self._second = 0.0
        self._steady = policy.Steady(PATIENCE)
        self.trace: list[tuple[float, int, float, float]] = []

    def tick(self, now: float, rows: float, tokens: float) -> None:
        if now < self._second:
            return
        self._second += 1.0
        self.working += sum(at <= now for at in self._coming)
        self._coming = [at for at in self._coming if at > now]
        wanted = self._scale(now, self.working, tokens, rows)
        self._coming += [now + self._start_up] * (min(wanted, self._replicas) - self.working - len(self._coming))
        self.working = min(self.working, self._steady(now, wanted))
        self.trace.append((now, self.working, rows, tokens))


class _Prefixes:
    """Which prefixes each replica's cache holds: the `most` that were used last."""

    def __init__(self, replicas: int, groups: int, most: int) -> None:
        self._used = np.full((replicas, groups), -1, dtype=np.float32)
        self._most, self._evicted = most, 0.0
        self.hits = 0

    def use(self, at: Ints, groups: Ints, now: float) -> npt.NDArray[np.bool_]:
        """Look them up, and keep them from now on. -> which were there."""
        hit = np.asarray(self._used[at, groups] >= 0)
        self.hits += int(hit.sum())
        self._used[at, groups] = now + 1
        if now >= self._evicted + 1.0:  # each second: what a cache holds too much until then is a few per cent
            self._evicted = now
            full = np.nonzero(np.count_nonzero(self._used >= 0, axis=1) > self._most)[0]
            kept = np.sort(self._used[full], axis=1)[:, -self._most]
            self._used[full] = np.where(self._used[full] < kept[:, None], -1, self._used[full])
        return hit
