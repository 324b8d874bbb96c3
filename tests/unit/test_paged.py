"""Paged KV: examples of each rule, and random traces against a simulated store that is read back."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.kv.paged import PagedLayout
from flover.kv.protocol import Grant, RowMove


def join(layout: PagedLayout, key: str, ids: list[int], salt: str = "", headroom: int = 0) -> Grant:
    grant = layout.join(key, ids, salt=salt, use_cache=True, headroom=headroom)
    assert grant is not None
    layout.check()
    return grant


def run(layout: PagedLayout, key: str, ids: list[int], salt: str = "") -> Grant:
    """A whole request: join, commit, leave."""
    grant = join(layout, key, ids, salt)
    layout.commit(key, ids, len(ids))
    layout.leave(key)
    layout.reorder({})
    layout.check()
    return grant


def test_join_takes_whole_blocks_for_all_tokens() -> None:
    layout = PagedLayout(4, 4)
    assert join(layout, "a", list(range(5))) == Grant(0, [0, 1], 8)
    assert (layout.num_free_blocks, layout.num_used_blocks, layout.num_cached_blocks) == (2, 2, 0)
    assert layout.num_reserved_blocks == 4
    assert layout.fits(16)
    assert not layout.fits(17)


def test_extend_adds_at_the_end_and_is_refused_whole() -> None:
    layout = PagedLayout(3, 4)
    join(layout, "a", [1, 2, 3, 4])
    assert layout.extend("a", 4) == Grant(1, [], 4)
    assert layout.extend("a", 13) is None
    assert layout.num_used_blocks == 1
    assert layout.extend("a", 9) == Grant(1, [1, 2], 12)
    layout.check()


def test_at_least_one_token_is_left_to_compute() -> None:
    layout = PagedLayout(8, 4)
    ids = list(range(12))
    run(layout, "a", ids)
    for num_tokens, num_cached in ((1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)):
        key = f"b{num_tokens}"
        assert join(layout, key, ids[:num_tokens]).num_cached_tokens == num_cached
        layout.leave(key)
        layout.reorder({})
    assert join(layout, "c", [*ids, 12]).num_cached_tokens == 12
    layout.leave("c")
    layout.reorder({})
    assert join(layout, "d", [*ids[:4], 99, *ids[5:]]).num_cached_tokens == 4, "a chain ends where ids differ"


def test_same_tokens_after_another_prefix_are_another_block() -> None:
    layout = PagedLayout(8, 2)
    run(layout, "a", [1, 1, 2, 2])
    assert join(layout, "b", [3, 3, 2, 2, 0]).num_cached_tokens == 0
    assert join(layout, "c", [2, 2, 0]).num_cached_tokens == 0


def test_salts_share_nothing() -> None:
    layout = PagedLayout(16, 2)
    ids = [1, 2, 3, 4, 5]
    for salt in ("", "x", "y"):
        assert run(layout, "a", ids, salt).num_cached_tokens == 0
    for salt in ("", "x", "y"):
        assert run(layout, "a", ids, salt).num_cached_tokens == 4


def test_use_cache_false_stays_out_both_ways() -> None:
    layout = PagedLayout(8, 2)
    ids = [1, 2, 3, 4, 5]
    for _ in range(2):
        grant = layout.join("a", ids, salt="", use_cache=False, headroom=0)
        assert grant is not None
        assert grant.num_cached_tokens == 0
        layout.commit("a", ids, 5)
        layout.leave("a")
        layout.reorder({})
        assert layout.num_cached_blocks == 0
    run(layout, "b", ids)
    assert layout.num_cached_blocks == 2
    grant = layout.join("a", ids, salt="", use_cache=False, headroom=0)
    assert grant is not None
    assert grant.num_cached_tokens == 0
    off = PagedLayout(8, 2, enable_prefix_caching=False)
    run(off, "a", ids)
    assert run(off, "a", ids).num_cached_tokens == 0


def test_hits_of_a_live_request_share_its_blocks() -> None:
    layout = PagedLayout(8, 2)
    ids = [1, 2, 3, 4, 5]
    a = join(layout, "a", ids)
    assert join(layout, "early", ids).num_cached_tokens == 0, "nothing is committed yet"
    layout.commit("a", ids, 4)
    b = join(layout, "b", ids)
    assert b.num_cached_tokens == 4
    assert b.block_ids[:2] == a.block_ids[:2]
    assert b.block_ids[2] != a.block_ids[2]
    assert layout.num_used_blocks == 3 + 3 + 1
    layout.leave("a")
    assert layout.num_cached_blocks == 0, "b still holds both"
    layout.check()


def test_a_private_copy_goes_on_in_the_chain_of_its_equal() -> None:
    layout = PagedLayout(12, 2)
    join(layout, "a", [1, 2, 3])
    join(layout, "b", [1, 2, 3])
    layout.commit("a", [1, 2, 3], 3)
    layout.commit("b", [1, 2, 3, 4], 4)  # its first block equals a's, its second is new
    assert join(layout, "c", [1, 2, 3, 4, 5]).num_cached_tokens == 4
    layout.leave("b")
    assert layout.num_free_blocks == 12 - 4, "only b's private first block is free; c holds its second"
    layout.check()


@pytest.mark.parametrize(("headroom", "joins"), [(0, True), (2, True), (3, False)])
def test_headroom_is_exact_without_hits(headroom: int, joins: bool) -> None:
    layout = PagedLayout(5, 2)
    run(layout, "old", [9, 9, 8, 8])  # two of the five are cached, and count as free
    grant = layout.join("a", [1, 2, 3, 4, 5], salt="", use_cache=True, headroom=headroom)
    assert (grant is not None) == joins
    assert layout.num_free_blocks + layout.num_cached_blocks == (2 if joins else 5)


@pytest.mark.parametrize(("headroom", "joins"), [(0, True), (2, True), (3, False)])
def test_headroom_counts_what_a_hit_revives(headroom: int, joins: bool) -> None:
    layout = PagedLayout(5, 2)
    ids = [1, 2, 3, 4, 5]
    run(layout, "old", ids)  # two cached
    grant = layout.join("a", ids, salt="", use_cache=True, headroom=headroom)
    assert (grant is not None) == joins
    assert layout.num_cached_blocks == (0 if joins else 2)


@pytest.mark.parametrize(("headroom", "joins"), [(1, True), (2, False)])
def test_headroom_does_not_count_a_hit_that_is_in_use(headroom: int, joins: bool) -> None:
    layout = PagedLayout(5, 2)
    ids = [1, 2, 3, 4, 5]
    join(layout, "old", ids)
    layout.commit("old", ids, 5)
    assert (layout.join("a", ids, salt="", use_cache=True, headroom=headroom) is not None) == joins


def test_hits_are_not_evicted_by_their_own_join() -> None:
    layout = PagedLayout(3, 2)
    run(layout, "old", [1, 2, 3, 4])
    assert join(layout, "a", [1, 2, 7, 8, 9]).num_cached_tokens == 2
    assert layout.num_cached_blocks == 0


def test_least_recently_used_goes_first_and_the_tail_of_a_chain_before_its_head() -> None:
    layout = PagedLayout(6, 2)
    a, b = [1, 1, 2, 2, 3, 3, 0], [4, 4, 5, 5, 0]
    run(layout, "a", a[:6])
    run(layout, "b", b[:4])
    assert layout.num_cached_blocks == 5
    join(layout, "x", [9, 9, 9])  # one free block and one evicted
    assert layout.num_cached_blocks == 4
    layout.leave("x", discard=True)
    layout.reorder({})
    assert join(layout, "a2", a[:5]).num_cached_tokens == 4, "only a's tail is gone"
    layout.leave("a2")  # now b is the oldest
    join(layout, "y", [8, 8, 8, 8, 8])
    assert layout.num_cached_blocks == 3
    layout.leave("y", discard=True)
    layout.reorder({})
    assert run(layout, "b2", b).num_cached_tokens == 2
    assert run(layout, "a3", a).num_cached_tokens == 4


def test_children_of_an_evicted_block_are_unreachable_even_if_it_comes_back() -> None:
    layout = PagedLayout(8, 2)
    join(layout, "a", [1, 2, 3])
    join(layout, "b", [1, 2, 3, 4])
    layout.commit("a", [1, 2, 3], 3)
    layout.commit("b", [1, 2, 3, 4], 4)  # b's second block hangs below a's first
    layout.leave("a", discard=True)
    layout.reorder({})
    assert join(layout, "c", [1, 2, 3, 4, 5]).num_cached_tokens == 0
    layout.commit("c", [1, 2, 3, 4, 5], 5)
    layout.leave("b")
    layout.leave("c")
    layout.check()


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    layout = PagedLayout(8, 4)
    src = join(layout, "a", list(range(7))).block_ids
    fork = layout.fork("a", "b", 7)
    assert fork == Grant(0, [src[0], 2], 8, 6, (RowMove(src[1], 2, 2),))
    layout.check()
    assert layout.fork("a", "c", 5) == Grant(0, [src[0], 3], 8, 4), "nothing to copy at a block's edge"
    assert layout.fork("a", "d", 1) == Grant(0, [4], 4, 0)
    layout.check()
    layout.leave("a")
    assert layout.num_used_blocks == 4
    layout.commit("b", list(range(7)), 6)
    layout.commit("c", list(range(7)), 4)
    layout.check()
    for key in "bcd":
        layout.leave(key)
    assert layout.num_cached_blocks == 1
    layout.check()


def test_fork_without_a_block_is_refused() -> None:
    layout = PagedLayout(2, 4)
    join(layout, "a", list(range(7)))
    assert layout.fork("a", "b", 7) is None
    layout.check()


def test_discard_drops_even_shared_blocks_from_the_cache() -> None:
    layout = PagedLayout(8, 2)
    ids = [1, 2, 3, 4, 5]
    join(layout, "a", ids)
    layout.commit("a", ids, 4)
    assert join(layout, "b", ids).num_cached_tokens == 4
    layout.leave("b", discard=True)
    layout.check()
    layout.leave("a")
    assert layout.num_cached_blocks == 0
    assert layout.num_free_blocks == 8


def test_a_fork_does_not_commit_what_its_source_discarded() -> None:
    layout = PagedLayout(8, 2)
    ids = [1, 2, 3, 4, 5]
    join(layout, "a", ids)
    assert layout.fork("a", "b", 5) is not None
    layout.leave("a", discard=True)
    layout.commit("b", ids, 5)
    assert join(layout, "c", ids).num_cached_tokens == 0


def test_reset_cache_keeps_requests_and_forgets_what_they_computed() -> None:
    layout = PagedLayout(8, 2)
    ids = [1, 2, 3, 4, 5]
    run(layout, "old", [7, 7, 7])
    join(layout, "a", ids)
    join(layout, "b", ids)
    layout.commit("a", ids, 4)
    layout.reset_cache()
    layout.check()
    layout.commit("a", ids, 5)
    layout.commit("b", ids, 5)
    assert layout.num_cached_blocks == 0
    layout.leave("a")
    assert join(layout, "c", ids).num_cached_tokens == 0
    layout.leave("b")
    layout.leave("c")
    assert layout.num_free_blocks == 8


def test_what_left_is_evicted_once_and_drained_once() -> None:
    layout = PagedLayout(4, 2)
    grant = join(layout, "a", [1, 2, 3])
    layout.commit("a", [1, 2, 3], 3)
    layout.leave("a")
    assert layout.reorder({}).evicted == ["a"]
    reordering = layout.reorder({})
    assert (reordering.evicted, reordering.moves, reordering.relocated) == ([], [], {})
    assert reordering.reserved_blocks == 4
    assert layout.drain_freed() == [grant.block_ids[1]], "the full block is cached, not garbage"
    assert layout.drain_freed() == []
    join(layout, "b", [5] * 8)
    assert layout.drain_freed() == [grant.block_ids[0]], "evicted"


def test_misuse_is_caught() -> None:
    layout = PagedLayout(4, 2)
    join(layout, "a", [1])
    with pytest.raises(AssertionError):
        join(layout, "a", [1])
    layout.leave("a")
    with pytest.raises(AssertionError):
        join(layout, "a", [1])  # its row is still there
    layout.reorder({})
    join(layout, "a", [1])
    for bad in ((0, 16), (4, 0)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            PagedLayout(*bad)


@dataclass
class Live:
    ids: list[int]
    salt: str
    blocks: list[int]
    num_computed: int


class Driver:
    """Random operations on a layout and on a simulated store, where a cell holds the prefix it stands for.

    What is freed is poisoned at once, what is discarded turns bad first; every live request must always read
    back its own prefix, whatever was shared, copied or reused meanwhile.
    """

    def __init__(self, rng: random.Random, num_blocks: int, block_size: int) -> None:
        self.rng, self.size = rng, block_size
        self.layout = PagedLayout(num_blocks, block_size)
        self.cells: list[object] = [None] * (num_blocks * block_size)
        self.live: dict[str, Live] = {}
        self.prefix: dict[tuple[object, int], int] = {}  # (prefix, token) -> a number for the longer prefix
        self.recent: list[list[int]] = [[]]
        self.left: list[str] = []
        self.num_joined = self.num_hits = self.num_refused = 0

    def cell(self, live: Live, position: int) -> int:
        return live.blocks[position // self.size] * self.size + position % self.size

    def contents(self, live: Live, count: int) -> list[int]:
        out: list[int] = []
        parent: object = live.salt
        for token in live.ids[:count]:
            parent = self.prefix.setdefault((parent, token), len(self.prefix))
            out.append(parent)
        return out

    def poison(self) -> None:
        for block in self.layout.drain_freed():
            self.cells[block * self.size : (block + 1) * self.size] = ["garbage"] * self.size

    def compute(self, live: Live, count: int) -> None:
        contents = self.contents(live, count)
        for position in range(live.num_computed, count):
            self.cells[self.cell(live, position)] = contents[position]
        live.num_computed = max(live.num_computed, count)

    def read_back(self, live: Live) -> None:
        found = [self.cells[self.cell(live, position)] for position in range(live.num_computed)]
        assert found == self.contents(live, live.num_computed)

    def new_ids(self) -> list[int]:
        ids = list(self.rng.choice(self.recent))
        del ids[self.rng.randint(0, len(ids)) :]
        ids += [self.rng.randint(0, 2) for _ in range(self.rng.randint(1, 3 * self.size))]
        self.recent = [*self.recent[-8:], ids]
        return list(ids)

    def join(self) -> None:
        layout, rng, key = self.layout, self.rng, f"r{self.num_joined}"
        ids, salt = self.new_ids(), rng.choice(["", "s"])
        use_cache, headroom = rng.random() < 0.9, rng.randint(0, 3)
        hits = layout._match(ids, salt)[0] if use_cache else []
        revived = sum(block in layout._cached for block in hits)
        before = layout.num_free_blocks + layout.num_cached_blocks
        after = before - revived - (-(-len(ids) // self.size) - len(hits))
        grant = layout.join(key, ids, salt=salt, use_cache=use_cache, headroom=headroom)
        assert (grant is not None) == (after >= headroom)
        if grant is None:
            self.num_refused += 1
            assert layout.num_free_blocks + layout.num_cached_blocks == before
            return
        assert layout.num_free_blocks + layout.num_cached_blocks == after
        assert grant.num_cached_tokens == len(hits) * self.size < len(ids)
        assert grant.capacity == len(grant.block_ids) * self.size >= len(ids)
        self.num_hits += len(hits) > 0
        self.add(key, Live(ids, salt, grant.block_ids, grant.num_cached_tokens), grant)

    def fork(self) -> None:
        src = self.rng.choice(list(self.live))
        source = self.live[src]
        num_tokens = self.rng.randint(1, min(len(source.ids), source.num_computed + 1))
        key = f"r{self.num_joined}"
        grant = self.layout.fork(src, key, num_tokens)
        if grant is not None:
            assert grant.num_cached_tokens == num_tokens - 1
            self.add(key, Live(source.ids[:num_tokens], source.salt, grant.block_ids, num_tokens - 1), grant)

    def add(self, key: str, live: Live, grant: Grant) -> None:
        self.num_joined += 1
        self.live[key] = live
        self.poison()
        for src, dst, count in grant.copies:
            start = src * self.size
            self.cells[dst * self.size : dst * self.size + count] = self.cells[start : start + count]
        self.read_back(live)

    def advance(self) -> None:
        key = self.rng.choice(list(self.live))
        live, layout = self.live[key], self.layout
        capacity = len(live.blocks) * self.size
        if live.num_computed < len(live.ids) <= capacity:  # a chunk of prefill
            self.compute(live, self.rng.randint(live.num_computed + 1, len(live.ids)))
        else:  # decode
            live.ids.append(self.rng.randint(0, 2))
            if len(live.ids) > capacity:
                grant = layout.extend(key, len(live.ids))
                if grant is None:
                    assert layout.num_free_blocks + layout.num_cached_blocks == 0
                    return self.leave(key)
                assert grant.start == len(live.blocks)
                live.blocks += grant.block_ids
                assert grant.capacity == len(live.blocks) * self.size
                self.poison()
            self.compute(live, len(live.ids))
        if self.rng.random() < 0.5:
            layout.commit(key, live.ids, self.rng.randint(0, live.num_computed))
        self.read_back(live)

    def leave(self, key: str) -> None:
        live = self.live.pop(key)
        discard = self.rng.random() < 0.1
        if discard:  # what only it can see turns bad
            shared = {block for other in self.live.values() for block in other.blocks}
            for block in set(live.blocks) - shared:
                self.cells[block * self.size : (block + 1) * self.size] = ["NaN"] * self.size
        self.layout.leave(key, discard)
        self.left.append(key)

    def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.2 or not self.live:
            self.join()
        elif choice < 0.25:
            self.fork()
        elif choice < 0.8:
            self.advance()
        elif choice < 0.9:
            self.leave(self.rng.choice(list(self.live)))
        elif choice < 0.905:
            self.layout.reset_cache()
        else:
            assert self.layout.reorder({key: live.num_computed for key, live in self.live.items()}).evicted == self.left
            self.left = []
        self.poison()
        self.layout.check()

    def drive(self, num_steps: int) -> None:
        for step in range(num_steps):
            self.step()
            if step % 20 == 0:
                for live in self.live.values():
                    self.read_back(live)
        for key in list(self.live):
            self.leave(key)
        self.layout.reset_cache()
        self.layout.check()
        assert self.layout.num_free_blocks == self.layout.num_blocks


def test_random_traces_read_back_their_own_tokens() -> None:
    num_steps = num_hits = num_refused = 0
    for seed in range(50):
        driver = Driver(random.Random(seed), num_blocks=4 + 3 * (seed % 6), block_size=1 + seed % 4)
        driver.drive(2_000)
        num_steps += 2_000
        num_hits += driver.num_hits
        num_refused += driver.num_refused
    assert num_steps == 100_000
    assert num_hits > 1_000, "the traces must exercise the cache"
    assert num_refused > 1_000, "and run out of blocks"


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12), st.integers(1, 5))
def test_short_traces(rng: random.Random, num_blocks: int, block_size: int) -> None:
    Driver(rng, num_blocks, block_size).drive(40)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 4))
def test_with_room_for_all_a_join_finds_the_longest_computed_prefix(prompts: list[list[int]], size: int) -> None:
    layout = PagedLayout(128, size)
    for number, ids in enumerate(prompts):
        longest = 0
        for other in prompts[:number]:
            for end in range(size, min(len(other), len(ids) - 1) + 1, size):
                longest = max(longest, end if other[:end] == ids[:end] else 0)
        assert run(layout, f"r{number}", ids).num_cached_tokens == longest
