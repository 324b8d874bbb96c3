"""Other ways to close the holes that finished requests leave, to compare `kv.slab.plan_moves` with.

Each plan is a pure function: tokens in each slot and which slots are live -> moves, to be made one after the other. All
end with the live slots in one contiguous region. `replay` runs a plan over a trace of requests, so that the layout that
one call leaves is what the next one meets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flover.kv.protocol import RowMove
from flover.kv.slab import plan_moves

Lens: TypeAlias = Sequence[int] | NDArray[Any]  # tokens, `[num_slots]`
Live: TypeAlias = Sequence[bool] | NDArray[Any]
Plan: TypeAlias = Callable[[Lens, Live], tuple[int, list[RowMove]]]  # base of the region, and the moves


def compact_to_front(lens: Lens, live: Live) -> tuple[int, list[RowMove]]:
    """The window at slot 0: live slots beyond it fill its holes, both in index order."""
    return plan_moves(lens, live, fixed_base=0)


def swap_last(lens: Lens, live: Live) -> tuple[int, list[RowMove]]:
    """The last live slot fills the first hole, until no hole is left (vLLM condenses its batch like this)."""
    alive, moves = list(map(bool, live)), list[RowMove]()
    hole, last = 0, len(alive) - 1
    while True:
        while hole < len(alive) and alive[hole]:
            hole += 1
        while last >= 0 and not alive[last]:
            last -= 1
        if hole >= last:
            return 0, moves
        moves.append(RowMove(last, hole, int(lens[last])))
        alive[hole], alive[last] = True, False


def shift(lens: Lens, live: Live) -> tuple[int, list[RowMove]]:
    """Compaction to slot 0 that keeps the order: every live slot behind the first hole moves up."""
    alive = np.flatnonzero(np.asarray(live, dtype=bool)).tolist()
    return 0, [RowMove(src, dst, int(lens[src])) for dst, src in enumerate(alive) if src != dst]


def paper_window(lens: Lens, live: Live) -> tuple[int, list[RowMove]]:
    """The release's shuffler (memory_shuffler.h): the first window, not circular, that holds the most live slots.

    How long a slot is plays no part in the choice; the moves are counted with the live prefix all the same.
    """
    base = _best_linear_window(np.asarray(live, dtype=bool).astype(np.int64), live)
    return plan_moves(lens, live, fixed_base=base)


def linear_window(lens: Lens, live: Live) -> tuple[int, list[RowMove]]:
    """Ours without the ring: the first window, not circular, that holds the most live tokens."""
    weights = np.where(np.asarray(live, dtype=bool), np.asarray(lens, dtype=np.int64), 0)
    return plan_moves(lens, live, fixed_base=_best_linear_window(weights, live))


def _best_linear_window(weights: NDArray[Any], live: Live) -> int:
    width = int(np.asarray(live, dtype=bool).sum())
    before = np.concatenate(([0], np.cumsum(weights)))
    return int(np.argmax(before[width:] - before[: len(before) - width])) if width else 0


def index_select_tokens(lens: Lens, live: Live) -> int:
    """Tokens that TGI's `filter` copies: every live row, padded to the longest, into a new cache beside the old one."""
    kept = np.asarray(lens, dtype=np.int64)[np.asarray(live, dtype=bool)]
    return int(kept.max() * len(kept)) if len(kept) else 0


PLANS: Mapping[str, Plan] = {
    "ours": plan_moves,
    "ours, no ring": linear_window,
    "paper": paper_window,
    "compact-to-front": compact_to_front,
    "swap-last": swap_last,
    "shift": shift,
}
INDEX_SELECT = "index-select"


class Cost(NamedTuple):
    """Of a trace: reorderings that had a hole to close, moves, tokens moved."""

    calls: int
    moves: int
    tokens: int


class Visit(NamedTuple):
    """A request of a trace, in steps: it has `prompt` tokens when it joins and gains one in each of `steps`."""

    join: int
    prompt: int
    steps: int


def replay(plan: Plan | None, visits: Sequence[Visit]) -> Cost:
    """What a plan moves over a trace; None is index-select.

    As many slots as requests, so that a plan without a ring never runs out. A join takes the slot behind the region.
    """
    num_slots = len(visits)
    slot_of: dict[int, int] = {}  # visit -> slot
    base = calls = moved = tokens = 0
    order = sorted(range(num_slots), key=lambda i: visits[i].join)
    events = sorted({v.join for v in visits} | {v.join + v.steps for v in visits})
    for now in events:
        leaving = [i for i in slot_of if visits[i].join + visits[i].steps <= now]
        for i in leaving:
            del slot_of[i]
        if leaving and slot_of:
            lens, live = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.bool_)
            for i, slot in slot_of.items():
                lens[slot], live[slot] = visits[i].prompt + now - visits[i].join, True
            calls += 1
            if plan is None:
                moved, tokens = moved + len(slot_of), tokens + index_select_tokens(lens, live)
                plan_made = compact_to_front(lens, live)
            else:
                plan_made = plan(lens, live)
                moved, tokens = moved + len(plan_made[1]), tokens + sum(move.num_tokens for move in plan_made[1])
            base = plan_made[0]
            at = {slot: i for i, slot in slot_of.items()}
            for src, dst, _ in plan_made[1]:
                at[dst] = at.pop(src)
            slot_of = {i: slot for slot, i in at.items()}
        elif not slot_of:
            base = 0
        while order and visits[order[0]].join <= now:
            slot_of[order.pop(0)] = (base + len(slot_of)) % num_slots
    return Cost(calls, moved, tokens)
