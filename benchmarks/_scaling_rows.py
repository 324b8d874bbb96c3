"""What runs and what waits on the replicas of the fluid model, for all of them at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flover.cluster.cost import Batch, Cost

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NOBODY = np.zeros(0, dtype=np.int64)


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


class Rows:
    """Rows that run. Each ends when its replica has made as many steps as it needs.

    anchor: seconds, by replica: a border between two steps. done: steps made until then. plain: seconds of a step of
    decode alone, in this tick.
    """

    def __init__(self, table: StepTable, replicas: int) -> None:
        self._table, self._every = table, np.arange(replicas)
        self.count, self._context = np.zeros(replicas), np.zeros(replicas)
        self.anchor, self.done, self.plain = np.zeros(replicas), np.zeros(replicas), np.ones(replicas)
        self.ids, self.at = NOBODY, NOBODY
        self._goal, self._base = np.zeros(0), np.zeros(0)  # steps made at the end; tokens less steps made
        self._left: list[tuple[Ints, Ints, Floats]] = []  # rows that are over: ids, replicas, last token

    def seconds(self, at: Ints, prompts: Floats, pairs: Floats, ending: Floats) -> Floats:
        """Of one step on some replicas, of prompt tokens beside the rows; `ending` of the prompts end in it."""
        context = self._context[at] + self.count[at] * self.done[at]
        return self._table(self.count[at] + ending, context, prompts - ending, pairs)

    def begin(self, now: float) -> None:
        """A tick: the length of its steps. Where nobody runs there are none, and one may begin at any time."""
        idle = self.count == 0
        self.anchor[idle] = np.maximum(self.anchor[idle], now)
        none = np.zeros(len(self._every))
        self.plain = self.seconds(self._every, none, none, none)
        self._before = self.anchor.copy(), self.done.copy()

    def border(self, at: Ints, seen: Floats) -> tuple[Floats, Floats]:
        """When a request that comes at `seen` gets its replica's attention, and plain steps until then."""
        gap = np.maximum(seen - self.anchor[at], 0)
        steps = np.where(self.count[at] > 0, np.ceil(gap / self.plain[at]), 0)
        return np.where(self.count[at] > 0, self.anchor[at] + steps * self.plain[at], self.anchor[at] + gap), steps

    def join(self, ids: Ints, at: Ints, prompt: Floats, output: Floats) -> None:
        """Rows that have their first token at their replica's anchor."""
        size, base = len(self.count), prompt - self.done[at]
        self.ids, self.at = np.concatenate([self.ids, ids]), np.concatenate([self.at, at])
        self._goal = np.concatenate([self._goal, self.done[at] + output - 1])
        self._base = np.concatenate([self._base, base])
        self.count += np.bincount(at, minlength=size)
        self._context += np.bincount(at, base, minlength=size)

    def make_room(self, at: Ints, now: float) -> None:
        """On full replicas, plain steps until a row is over, if one is before `now`."""
        full = np.zeros(len(self.count), dtype=bool)
        full[at] = True
        mine = full[self.at]
        goal = np.full(len(self.count), np.inf)
        np.minimum.at(goal, self.at[mine], self._goal[mine])
        steps = np.maximum(goal[at] - self.done[at], 0)
        until = self.anchor[at] + steps * self.plain[at]
        going = until < now
        self.anchor[at[going]] = until[going]
        self.done[at[going]] += steps[going]
        full[at[~going]] = False
        self._leave(full[self.at] & (self._goal <= self.done[self.at]))

    def _leave(self, over: npt.NDArray[np.bool_]) -> None:
        """Rows that are over. Steps of a tick are taken for equally long: a last token is less than a tick off."""
        at = self.at[over]
        anchor, done = (array[at] for array in self._before)
        share = (self._goal[over] - done) / np.maximum(self.done[at] - done, 1)
        self._left.append((self.ids[over], at, anchor + share * (self.anchor[at] - anchor)))
        self.count -= np.bincount(at, minlength=len(self.count))
        self._context -= np.bincount(at, self._base[over], minlength=len(self.count))
        self.ids, self.at = self.ids[~over], self.at[~over]
        self._goal, self._base = self._goal[~over], self._base[~over]

    def end(self, now: float) -> tuple[Ints, Ints, Floats]:
        """Of the tick: plain steps until now. -> rows that are over since its begin, their replicas, last tokens."""
        steps = np.where(self.count > 0, np.floor(np.maximum(now - self.anchor, 0) / self.plain), 0)
        self.anchor += steps * self.plain
        self.done += steps
        self._leave(self._goal <= self.done[self.at])
        left, self._left = self._left, []
        ids, at, last = (np.concatenate(parts) for parts in zip(*left))
        return ids, at, last


class Waiting:
    """Prompts that wait, by replica and then arrival. left: prompt tokens to compute, of every request."""

    def __init__(self, arrival: Floats, prompt: Floats, max_rows: int, budget: int) -> None:
        self._arrival, self._prompt, self.left = arrival, prompt, prompt.copy()
        self._max_rows, self._budget = max_rows, budget
        self.ids, self.at = NOBODY, NOBODY

    def add(self, ids: Ints, at: Ints) -> None:
        self.ids, self.at = np.concatenate([self.ids, ids]), np.concatenate([self.at, at])
        order = np.argsort(self.at, kind="stable")
        self.ids, self.at = self.ids[order], self.at[order]

    def step(self, rows: Rows, end: float) -> tuple[Ints, Ints] | None:
        """On each replica, the next step with prompts that begins before `end`; `rows` are then at its end.

        -> prompts that ended in it, their replicas; None if there is no such step.
        """
        heads = np.flatnonzero(np.diff(self.at, prepend=-1))
        busy = self.at[heads]
        full = busy[rows.count[busy] >= self._max_rows]
        if len(full):
            rows.make_room(full, end)
        begins, plain = rows.border(busy, self._arrival[self.ids[heads]])
        go = (begins < end) & (rows.count[busy] < self._max_rows)
        if not go.any():
            return None
        # of the replicas that go, prompts that are there: the first that are free rows for, while there are tokens
        number = np.full(len(rows.count), -1)
        number[busy[go]] = np.arange(go.sum())
        size, mine = np.bincount(self.at, minlength=len(rows.count))[busy], number[self.at]
        place = np.arange(len(self.at)) - np.repeat(heads, size)
        there = (mine >= 0) & (place < (self._max_rows - rows.count)[self.at])
        there[there] = self._arrival[self.ids[there]] <= begins[go][mine[there]]
        ids, at, mine = self.ids[there], self.at[there], mine[there]
        need = self.left[ids]
        before = np.cumsum(need) - need
        before -= before[np.flatnonzero(np.diff(mine, prepend=-1))][mine]
        took = np.clip(np.maximum(self._budget - rows.count[at], 16) - before, 0, need)
        pairs = took * (self._prompt[ids] - need + took / 2)
        ended = took == need
        many = int(go.sum())
        prompts, pairs, ending = (np.bincount(mine, x, minlength=many) for x in (took, pairs, ended.astype(float)))
        at_once = busy[go]
        rows.anchor[at_once] = begins[go] + rows.seconds(at_once, prompts, pairs, ending)
        rows.done[at_once] += plain[go] + 1
        self.left[ids] -= took
        keep = np.ones(len(self.ids), dtype=bool)
        keep[np.flatnonzero(there)[ended]] = False
        self.ids, self.at = self.ids[keep], self.at[keep]
        return ids[ended], at[ended]
