"""Slab KV: the plan against brute force, the traps of the paper's release, and random traces."""

from __future__ import annotations

import random
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.kv.protocol import Grant, Reordering, RowMove
from flover.kv.slab import MIN_RESERVED, SlabLayout, SlabMode, plan_moves

MODES: tuple[SlabMode, ...] = ("off", "move", "indirect")


def join(layout: SlabLayout, key: str) -> int | None:
    """The slot `key` gets."""
    grant = layout.join(key, [0], salt="", use_cache=True, headroom=5)
    layout.check()
    return None if grant is None else grant.block_ids[0]


def leave(layout: SlabLayout, keys: str, lens: dict[str, int]) -> Reordering:
    for key in keys:
        layout.leave(key)
    reordering = layout.reorder(lens)
    layout.check()
    return reordering


def window(base: int, width: int, num_slots: int) -> list[int]:
    return [(base + i) % num_slots for i in range(width)]


def best_window(lens: list[int], live: list[bool], width: int) -> tuple[int, int]:
    """Brute force over all windows: (tokens moved, base), ties to the lowest base."""
    num_slots = len(lens)
    return min(
        (sum(lens[i] for i in range(num_slots) if live[i] and i not in window(base, width, num_slots)), base)
        for base in range(num_slots)
    )


def apply(moves: list[RowMove], live: list[bool]) -> list[bool]:
    after = list(live)
    for src, dst, _ in moves:
        assert after[src]
        assert not after[dst]
        after[src], after[dst] = False, True
    return after


@pytest.mark.parametrize("num_slots", range(1, 9))
def test_plan_is_the_cheapest_window_for_every_mask(num_slots: int) -> None:
    rng = random.Random(num_slots)
    for live in map(list, product((False, True), repeat=num_slots)):
        width = sum(live)
        for lens in ([1] * num_slots, [rng.randint(1, 5) for _ in live], [rng.randint(0, 2) for _ in live]):
            base, moves = plan_moves(lens, live)
            assert (sum(move.num_tokens for move in moves), base) == best_window(lens, live, width)
            assert apply(moves, live) == [i in window(base, width, num_slots) for i in range(num_slots)]
            assert all(move.num_tokens == lens[move.src] for move in moves)


@pytest.mark.parametrize("num_slots", range(1, 7))
def test_no_assignment_of_live_slots_to_a_window_is_cheaper(num_slots: int) -> None:
    rng = random.Random(num_slots)
    for live in map(list, product((False, True), repeat=num_slots)):
        lens = [rng.randint(1, 9) for _ in live]
        sources = [i for i in range(num_slots) if live[i]]
        cheapest = min(
            sum(lens[src] for src, dst in zip(sources, targets) if src != dst)
            for base in range(num_slots)
            for targets in permutations(window(base, len(sources), num_slots))
        )
        assert sum(move.num_tokens for move in plan_moves(lens, live)[1]) == cheapest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=40), st.data())
def test_plan_with_a_given_base_or_width(slots: list[tuple[int, bool]], data: st.DataObject) -> None:
    lens, live = [tokens for tokens, _ in slots], [alive for _, alive in slots]
    width = data.draw(st.integers(sum(live), len(slots)))
    start = data.draw(st.integers(0, len(slots) - 1))
    base, moves = plan_moves(np.array(lens), np.array(live), fixed_base=start, width=width)
    assert base == start
    after = apply(moves, live)
    target = window(base, width, len(slots))
    assert {i for i, alive in enumerate(after) if alive} <= set(target)
    assert [move.src for move in moves] == [i for i, alive in enumerate(live) if alive and i not in target]
    assert [move.dst for move in moves] == [i for i in target if not live[i]][: len(moves)]
    assert plan_moves(lens, live)[0] == (best_window(lens, live, sum(live))[1] if any(live) else 0)


def test_the_plan_weighs_tokens_not_slots() -> None:
    """Both masks have a window at a lower base that keeps as many slots, and moves more tokens."""
    assert plan_moves([5, 5, 0, 9, 0, 0], [True, True, False, True, False, False]) == (1, [RowMove(0, 2, 5)])
    assert plan_moves([5, 5, 0, 0, 99, 0], [True, True, False, False, True, False]) == (4, [RowMove(1, 5, 5)])
    assert plan_moves([5, 5, 0, 0], [False] * 4) == (0, [])


def test_a_slot_is_a_block() -> None:
    layout = SlabLayout(8, 100, mode="move")
    assert layout.fits(100)
    assert not layout.fits(101)
    assert layout.join("a", [1, 2], salt="s", use_cache=True, headroom=7) == Grant(0, [0], 100)
    assert layout.extend("a", 100) == Grant(1, [], 100)
    assert layout.fork("a", "b", 2) is None
    layout.commit("a", [1, 2], 2)
    layout.reset_cache()
    assert (layout.num_free_blocks, layout.num_used_blocks, layout.num_cached_blocks) == (7, 1, 0)
    with pytest.raises(AssertionError):
        layout.extend("a", 101)
    with pytest.raises(AssertionError):
        join(layout, "a")
    layout.leave("a")
    with pytest.raises(AssertionError):
        join(layout, "a")  # its row is still there
    for bad in ((0, 1, "move"), (1, 0, "move"), (1, 1, "fast")):
        with pytest.raises(ValueError, match="got"):
            SlabLayout(bad[0], bad[1], mode=bad[2])  # type: ignore[arg-type]


def test_move_closes_holes_with_live_prefixes_only() -> None:
    layout = SlabLayout(6, 100, mode="move")
    assert [join(layout, key) for key in "abcdef"] == [0, 1, 2, 3, 4, 5]
    assert join(layout, "g") is None
    lens = dict(zip("abcdef", (50, 40, 9, 30, 9, 60)))
    reordering = leave(layout, "bd", lens)  # live: a c e f at 0 2 4 5; the windows 3 4 5 0 and 4 5 0 1 move c alone
    assert reordering == Reordering([RowMove(2, 3, 9)], {"c": 3}, ["b", "d"], 6)
    assert sorted(layout.drain_freed()) == [1, 2], "3 was freed, and is a destination now"
    assert [join(layout, key) for key in "gh"] == [1, 2], "the slots after the window"
    assert leave(layout, "", lens) == Reordering([], {}, [], 6)


def test_indirect_leaves_slots_alone_and_fills_the_lowest() -> None:
    layout = SlabLayout(6, 100, mode="indirect")
    assert [join(layout, key) for key in "abcdef"] == [0, 1, 2, 3, 4, 5]
    assert leave(layout, "db", {}) == Reordering([], {}, ["d", "b"], 6)
    assert [join(layout, key) for key in "ghi"] == [1, 3, None]


def test_off_keeps_dead_rows_until_an_edge_frees_them() -> None:
    layout = SlabLayout(4, 100, mode="off")
    assert [join(layout, key) for key in "abcd"] == [0, 1, 2, 3]
    assert leave(layout, "bc", {}) == Reordering([], {}, [], 4)
    assert join(layout, "e") is None, "two dead holes, and the window spans the ring"
    assert (layout.num_free_blocks, layout.num_used_blocks, layout.drain_freed()) == (0, 4, [])
    assert leave(layout, "a", {}).evicted == ["a", "b", "c"]
    assert sorted(layout.drain_freed()) == [0, 1, 2]
    assert [join(layout, key) for key in "efg"] == [0, 1, 2], "the ring wraps"
    assert leave(layout, "gf", {}).evicted == ["g", "f"], "the high edge, from the end"
    assert leave(layout, "ed", {}).evicted == ["d", "e"]
    assert layout.num_free_blocks == 4


@pytest.mark.parametrize("mode", ["move", "indirect"])
def test_memory_is_reserved_on_demand_released_and_taken_again(mode: SlabMode) -> None:
    layout = SlabLayout(32, 10, mode=mode)
    keys = [f"r{i}" for i in range(32)]
    for _ in range(3):
        reserved = [layout.num_reserved_blocks]
        for key in keys:
            join(layout, key)
            reserved.append(layout.num_reserved_blocks)
        assert sorted(set(reserved)) == [4, 6, 9, 14, 21, 32]
        for key in keys[:15]:
            layout.leave(key)
        assert layout.reorder(dict.fromkeys(keys, 5)).reserved_blocks == 32, "17 of 32: not below half"
        for key in keys[15:29]:
            layout.leave(key)
        lens = dict(zip(keys, range(32)))
        reordering = layout.reorder(lens)
        layout.check()
        assert (reordering.reserved_blocks, sorted(layout._slot_of.values())) == (5, [0, 1, 2])
        assert max(layout.drain_freed()) < 5, "the tail is no longer there to poison"
        for key in keys[29:]:
            layout.leave(key)
        assert layout.reorder({}).reserved_blocks == MIN_RESERVED
        layout.check()


def test_an_indirect_release_moves_only_what_lies_in_the_tail() -> None:
    layout = SlabLayout(16, 10, mode="indirect")
    for key in "abcdefghijklmn":
        join(layout, key)
    assert layout.num_reserved_blocks == 14
    reordering = leave(layout, "abcefgijklm", {"d": 3, "h": 7, "n": 9})  # d h n are at 3 7 13
    assert reordering.moves == [RowMove(7, 0, 7), RowMove(13, 1, 9)]
    assert (reordering.relocated, reordering.reserved_blocks) == ({"h": 0, "n": 1}, 5)
    assert [join(layout, key) for key in "xyz"] == [2, 4, 5]


@pytest.mark.parametrize("mode", ["move", "indirect"])
@pytest.mark.parametrize(("low", "swing"), [(4, 1), (9, 3), (10, 3), (14, 4), (21, 7), (30, 8), (40, 12)])
def test_an_oscillating_load_settles(mode: SlabMode, low: int, swing: int) -> None:
    layout = SlabLayout(64, 10, mode=mode)
    live = [f"r{i}" for i in range(low)]
    for key in live:
        join(layout, key)
    for round_ in range(30):
        for i in range(swing):
            live.append(f"s{round_}.{i}")
            assert join(layout, live[-1]) is not None
        if round_ == 0:
            settled = layout.num_reserved_blocks
        gone, live = live[:swing], live[swing:]
        for key in gone:
            layout.leave(key)
        assert layout.reorder(dict.fromkeys(live, 1)).reserved_blocks == settled


@pytest.mark.parametrize("mode", ["move", "indirect"])
def test_resizes_cost_joins_and_leaves_in_proportion(mode: SlabMode) -> None:
    """Whatever the load, at least a sixth of the capacity joins or leaves between a growth and a release."""
    rng = random.Random(0)
    layout = SlabLayout(100, 10, mode=mode)
    live: list[str] = []
    num_since, num_resizes, grew, drift = 0, 0, True, 0.5
    for step in range(20_000):
        if step % 50 == 0:
            drift = rng.choice((0.2, 0.5, 0.8))
        before = layout.num_reserved_blocks
        num_since += 1
        if not live or (rng.random() < drift and len(live) < 100):
            live.append(f"r{step}")
            assert join(layout, live[-1]) is not None
        else:
            layout.leave(live.pop(rng.randrange(len(live))))
            layout.reorder(dict.fromkeys(live, 1))
        after = layout.num_reserved_blocks
        if after != before:
            assert (after > before) == grew or num_since >= before / 6
            grew, num_since, num_resizes = after > before, 0, num_resizes + 1
    assert num_resizes > 50


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 7])
def test_slots_serve_any_number_of_requests(mode: SlabMode, num_slots: int) -> None:
    layout = SlabLayout(num_slots, 10, mode=mode)
    used = set()
    for i in range(40 * num_slots):
        if i >= num_slots:
            layout.leave(f"r{i - num_slots}")
            layout.reorder({f"r{j}": 1 for j in range(i - num_slots + 1, i)})
        slot = join(layout, f"r{i}")
        assert slot is not None, "first in, first out never leaves a hole inside"
        used.add(slot)
    assert used == set(range(num_slots))


def test_a_join_before_the_reordering_takes_no_live_slot() -> None:
    layout = SlabLayout(4, 10, mode="move")
    for key in "abc":
        join(layout, key)
    layout.leave("b")
    assert join(layout, "d") == 3
    assert join(layout, "e") is None, "the hole is closed by the reordering only"
    assert leave(layout, "", dict.fromkeys("acd", 1)).evicted == ["b"]
    assert join(layout, "e") is not None


class Driver:
    """Random operations, carried out on a store of `(key, position)` cells that ends where memory ends."""

    def __init__(self, rng: random.Random, num_slots: int, mode: SlabMode) -> None:
        self.rng, self.mode, self.tokens = rng, mode, 12
        self.layout = SlabLayout(num_slots, self.tokens, mode=mode)
        self.store: list[list[object]] = []  # of the slots that are backed by memory
        self.live: dict[str, int] = {}  # key -> tokens computed
        self.slots: dict[str, int] = {}  # as the device knows them: of the dead, too, until they are evicted
        self.num_joined = self.num_moved = 0
        self.sizes: set[int] = set()
        self.map(self.layout.num_reserved_blocks)

    def map(self, reserved: int) -> None:
        kept = self.store[:reserved]
        self.store = kept + [["unwritten"] * self.tokens for _ in range(reserved - len(kept))]
        self.sizes.add(reserved)

    def poison(self) -> None:
        for slot in self.layout.drain_freed():
            self.store[slot][:] = ["garbage"] * self.tokens

    def join(self) -> None:
        key, layout = f"r{self.num_joined}", self.layout
        slot = join(layout, key)
        if slot is None:
            room = layout.num_free_blocks
            assert room == 0 or (self.mode != "indirect" and layout._width == layout.num_blocks)
            return
        self.map(layout.num_reserved_blocks)
        assert slot not in self.slots.values() or self.mode != "off", "a dead row still writes there"
        self.num_joined += 1
        self.slots[key] = slot
        self.live[key] = 0
        self.write(key, self.rng.randint(1, 4))

    def write(self, key: str, count: int) -> None:
        start, end = self.live[key], min(self.tokens, self.live[key] + count)
        self.store[self.slots[key]][start:end] = [(key, position) for position in range(start, end)]
        self.live[key] = end

    def reorder(self) -> None:
        layout = self.layout
        reordering = layout.reorder(self.live)
        sources, targets = {m.src for m in reordering.moves}, {m.dst for m in reordering.moves}
        assert not sources & targets
        assert len(targets) == len(reordering.moves)
        for src, dst, count in reordering.moves:
            self.store[dst][:count] = self.store[src][:count]
        for key, slot in reordering.relocated.items():
            self.slots[key] = slot
        for key in reordering.evicted:
            assert key not in self.live
            del self.slots[key]
        self.num_moved += sum(move.num_tokens for move in reordering.moves)
        assert reordering.reserved_blocks == layout.num_reserved_blocks
        self.map(reordering.reserved_blocks)
        if self.mode != "off":
            assert self.slots.keys() == self.live.keys()
            assert layout.num_free_blocks == layout.num_blocks - len(self.live)
        if self.mode == "move":  # the window is the set of live rows
            taken = {(layout._base + i) % len(self.store) for i in range(len(self.live))}
            assert set(self.slots.values()) == taken

    def step(self, load: float) -> None:
        choice = self.rng.random()
        if choice < 0.3:
            if self.rng.random() < load:
                self.join()
        elif choice < 0.6 and self.live:
            self.write(self.rng.choice(list(self.live)), 1)
        elif choice < 0.8 and self.live:
            key = self.rng.choice(list(self.live))
            self.layout.leave(key, discard=self.rng.random() < 0.1)
            del self.live[key]
        else:
            self.reorder()
        self.poison()
        self.layout.check()

    def drive(self, num_steps: int) -> None:
        for step in range(num_steps):
            self.step(load=0.4 if step // 200 % 2 else 1.0)
            for key, count in self.live.items():
                assert self.store[self.slots[key]][:count] == [(key, position) for position in range(count)]
        for key in list(self.live):
            self.layout.leave(key)
            del self.live[key]
        self.reorder()
        self.layout.check()
        assert self.layout.num_free_blocks == self.layout.num_blocks


@pytest.mark.parametrize("mode", MODES)
def test_random_traces_read_back_their_own_tokens(mode: SlabMode) -> None:
    num_joined = num_moved = 0
    sizes: set[int] = set()
    for seed in range(17):
        driver = Driver(random.Random(seed), (1, 2, 5, 16, 30)[seed % 5], mode)
        driver.drive(2_000)
        num_joined += driver.num_joined
        num_moved += driver.num_moved
        sizes |= driver.sizes
    assert num_joined > 1_000
    assert (num_moved > 0) == (mode != "off")
    assert len(sizes) > (4 if mode == "off" else 6), "the traces must grow and release"


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12), st.sampled_from(MODES))
def test_short_traces(rng: random.Random, num_slots: int, mode: SlabMode) -> None:
    Driver(rng, num_slots, mode).drive(60)
