"""The plans that `flover bench paper --figure reorder` compares, against brute force."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.bench.plans import PLANS, Plan, Visit, index_select_tokens, replay
from flover.kv.protocol import RowMove

SLOTS = st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=40)


def apply(moves: list[RowMove], lens: list[int], live: list[bool]) -> set[int]:
    """One after the other; -> the live slots."""
    at = {i: lens[i] for i, alive in enumerate(live) if alive}
    for src, dst, num_tokens in moves:
        assert dst not in at
        assert at[src] == num_tokens
        at[dst] = at.pop(src)
    return set(at)


def moved(plan: Plan, lens: list[int], live: list[bool]) -> int:
    return sum(move.num_tokens for move in plan(lens, live)[1])


def outside(lens: list[int], live: list[bool], base: int) -> int:
    """Live tokens outside a window as wide as there are live slots: what any plan into it must move."""
    window = {(base + i) % len(lens) for i in range(sum(live))}
    return sum(lens[i] for i in range(len(lens)) if live[i] and i not in window)


@pytest.mark.parametrize("num_slots", range(1, 9))
def test_every_mask_of_up_to_eight_slots(num_slots: int) -> None:
    rng = random.Random(num_slots)
    for live in map(list, product((False, True), repeat=num_slots)):
        lens, width = [rng.randint(1, 9) for _ in live], sum(live)
        linear = range(num_slots - width + 1)
        assert moved(PLANS["ours"], lens, live) == min(outside(lens, live, base) for base in range(num_slots))
        assert moved(PLANS["ours, no ring"], lens, live) == min(outside(lens, live, base) for base in linear)
        assert moved(PLANS["compact-to-front"], lens, live) == outside(lens, live, 0)
        assert moved(PLANS["swap-last"], lens, live) == outside(lens, live, 0)
        fewest = min(outside([1] * num_slots, live, base) for base in linear)
        assert len(PLANS["paper"](lens, live)[1]) == fewest  # its own aim: fewest slots


@settings(max_examples=300, deadline=None)
@given(SLOTS)
def test_each_plan_leaves_one_region_and_ours_moves_the_fewest_tokens(slots: list[tuple[int, bool]]) -> None:
    lens, live = [tokens for tokens, _ in slots], [alive for _, alive in slots]
    best = moved(PLANS["ours"], lens, live)
    for name, plan in PLANS.items():
        base, moves = plan(lens, live)
        assert apply(moves, lens, live) == {(base + i) % len(lens) for i in range(sum(live))}, name
        assert best <= moved(plan, lens, live), name
    assert best <= index_select_tokens(lens, live)


def test_plans_by_hand() -> None:
    lens, live = [5, 5, 1, 1, 9], [True, False, True, True, True]
    assert PLANS["swap-last"](lens, live) == (0, [RowMove(4, 1, 9)])
    assert PLANS["shift"](lens, live) == (0, [RowMove(2, 1, 1), RowMove(3, 2, 1), RowMove(4, 3, 9)])
    assert PLANS["paper"](lens, live) == (0, [RowMove(4, 1, 9)])  # the first of two that hold three slots
    assert PLANS["ours, no ring"](lens, live) == (1, [RowMove(0, 1, 5)])
    assert PLANS["ours"](lens, live) == (2, [])  # 2, 3, 4 and, round the ring, 0
    assert index_select_tokens(lens, live) == 36


def test_a_trace_by_hand() -> None:
    """Slot 1 ends first: ours keeps 2, 3 and, round the ring, 0. Then 0 ends, at an edge: nothing has to move."""
    visits = [Visit(0, 10, 9), Visit(0, 10, 5), Visit(0, 10, 20), Visit(0, 10, 20)]
    assert replay(PLANS["ours"], visits) == (2, 0, 0)
    assert replay(PLANS["swap-last"], visits) == (2, 2, 15 + 19)
    assert replay(PLANS["shift"], visits) == (2, 4, 15 + 15 + 19 + 19)
    assert replay(None, visits) == (2, 3 + 2, 3 * 15 + 2 * 19)


def test_the_cheapest_call_is_not_always_the_cheapest_trace() -> None:
    """Ours is optimal call by call; some traces cost it more than swap-last in all, far more cost it less."""
    rng = random.Random(0)
    worse = better = 0
    for _ in range(300):
        visits = [Visit(rng.randint(0, 20), 8, rng.randint(1, 40)) for _ in range(8)]
        ours, theirs = replay(PLANS["ours"], visits).tokens, replay(PLANS["swap-last"], visits).tokens
        worse, better = worse + (ours > theirs), better + (ours < theirs)
    assert better > 10 * worse
