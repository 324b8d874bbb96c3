"""Slab KV: one contiguous slot per request, and the paper's buffer reordering between slots.

Owns which request sits in which slot, and how many slots are reserved (backed by memory). Slots `[0,
reserved)` form a ring. Three modes:

    off       live and dead rows share the window [base, base + width); a dead one goes at an edge only
    move      compaction: after every reorder the live slots are exactly the window
    indirect  slots stay where they are, and a join takes the lowest free one

Invariant: a join never forces a move, and every free slot serves any later request. The idea is
the paper's (arXiv 2305.13484); here it is weighted by tokens, since a move copies the live prefix.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from flover.kv.protocol import Grant, KVLayout, Reordering, RowMove

SlabMode: TypeAlias = Literal["off", "move", "indirect"]
MIN_RESERVED = 4


def plan_moves(
    lens: Sequence[int] | NDArray[Any],
    live: Sequence[bool] | NDArray[Any],
    *,
    fixed_base: int | None = None,
    width: int | None = None,
) -> tuple[int, list[RowMove]]:
    """Choose the circular window that keeps the most live tokens in place, and the moves of the rest into it.

    Live slots outside, in index order, go to holes inside, in window order. Given a window every assignment
    moves the same tokens, so the best window is optimal. O(number of slots).

    Args:
        lens: tokens in each slot, `[num_slots]`; ignored where dead.
        live: which slots are live, `[num_slots]`.
        fixed_base: where the window must start (0 for a release); by default the best, ties to the lowest.
        width: of the window; by default the number of live slots, which it must not be below.

    Returns:
        The base of the window, and the moves. No destination is a source.
    """
    mask = np.asarray(live, dtype=bool)
    tokens = np.where(mask, np.asarray(lens, dtype=np.int64), 0)
    num_slots, num_live = len(mask), int(mask.sum())
    width = num_live if width is None else width
    assert num_live <= width <= num_slots
    if fixed_base is None:
        before = np.concatenate(([0], np.cumsum(np.concatenate((tokens, tokens)))))  # [2 * num_slots + 1]
        fixed_base = int(np.argmax(before[width : width + num_slots] - before[:num_slots])) if num_live else 0
    window = (fixed_base + np.arange(width)) % max(num_slots, 1)
    outside = mask.copy()
    outside[window] = False
    sources = np.flatnonzero(outside)
    holes = window[~mask[window]][: len(sources)]
    assert len(holes) == len(sources)
    assert not mask[holes].any()
    return fixed_base, list(map(RowMove, sources.tolist(), holes.tolist(), tokens[sources].tolist()))


class SlabLayout(KVLayout):
    """`num_slots` slots of `slot_tokens` tokens; `KVLayout` is the contract, with a slot for a block.

    Reserved slots grow by half when a join finds none, and are given back when over twice the live ones, down
    to one and a half times: far enough apart that neither thrashes.

    Args:
        num_slots: slots of the device store.
        slot_tokens: tokens per slot, the longest request.
        mode: see the module. `off` reserves all slots for good.
    """

    def __init__(self, num_slots: int, slot_tokens: int, *, mode: SlabMode) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        if slot_tokens < 1:
            raise ValueError(f"slot_tokens must be at least 1, got {slot_tokens}")
        if mode not in get_args(SlabMode):
            raise ValueError(f"mode must be one of {get_args(SlabMode)}, got {mode!r}")
        self.num_blocks = num_slots
        self.block_size = slot_tokens
        self.mode: SlabMode = mode
        self._reserved = num_slots if mode == "off" else min(num_slots, MIN_RESERVED)
        self._slot_of: dict[str, int] = {}
        self._key_at: list[str | None] = [None] * num_slots
        self._base = 0  # the window (off, move); in move it has holes between a leave and the next reorder
        self._width = 0
        self._free = list(range(self._reserved)) if mode == "indirect" else []  # a heap
        self._dead: dict[int, str] = {}  # mode off: slot -> the key that left it
        self._left: dict[str, None] = {}  # keys that left and are not evicted
        self._freed: set[int] = set()  # a set: bounded even if nobody drains it

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.block_size

    def join(self, key: str, token_ids: Sequence[int], *, salt: str, use_cache: bool, headroom: int) -> Grant | None:
        """Give `key` a slot; nothing is cached, and a slot never runs out, so headroom is ignored."""
        assert key not in self._slot_of, key
        assert key not in self._left, key
        assert 0 < len(token_ids) <= self.block_size
        slot = self._take()
        if slot is None:
            return None
        assert self._key_at[slot] is None
        assert slot not in self._dead
        self._slot_of[key] = slot
        self._key_at[slot] = key
        return Grant(0, [slot], self.block_size)

    def fork(self, src: str, key: str, num_tokens: int) -> Grant | None:
        """Always None: slots share nothing, so the caller joins `key` with the whole prompt."""
        return None

    def extend(self, key: str, num_tokens: int) -> Grant | None:
        assert key in self._slot_of
        assert num_tokens <= self.block_size
        return Grant(1, [], self.block_size)

    def commit(self, key: str, token_ids: Sequence[int], num_tokens: int) -> None:
        assert key in self._slot_of
        assert num_tokens <= self.block_size

    def leave(self, key: str, discard: bool = False) -> None:
        slot = self._slot_of.pop(key)
        self._key_at[slot] = None
        self._left[key] = None
        if self.mode == "off":
            self._dead[slot] = key
            return
        self._freed.add(slot)
        if self.mode == "indirect":
            heapq.heappush(self._free, slot)

    def reorder(self, num_tokens: Mapping[str, int]) -> Reordering:
        if self.mode == "off":
            return Reordering([], {}, self._evict_edges(), self._reserved)
        if not self._left:  # nothing has left, so there is no hole
            return Reordering([], {}, [], self._reserved)
        evicted = list(self._left)
        self._left.clear()
        num_live = len(self._slot_of)
        shrink = self._reserved > max(2 * num_live, MIN_RESERVED)
        reserved = max(MIN_RESERVED, _times_one_and_a_half(num_live)) if shrink else self._reserved
        moves = self._plan(num_tokens, reserved)
        relocated = self._apply(moves)
        if shrink:
            self._give_back(reserved)
        return Reordering(moves, relocated, evicted, self._reserved)

    def drain_freed(self) -> list[int]:
        freed = list(self._freed)
        self._freed.clear()
        return freed

    def reset_cache(self) -> None:
        """Nothing is cached."""

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - self.num_used_blocks

    @property
    def num_used_blocks(self) -> int:
        return len(self._slot_of) + len(self._dead)

    @property
    def num_cached_blocks(self) -> int:
        return 0

    @property
    def num_reserved_blocks(self) -> int:
        return self._reserved

    def check(self) -> None:
        live = set(self._slot_of.values())
        assert live == {slot for slot, key in enumerate(self._key_at) if key is not None}
        assert all(self._key_at[slot] == key for key, slot in self._slot_of.items())
        assert not live & self._dead.keys()
        assert not self._slot_of.keys() & self._left.keys()
        assert 0 < self._reserved <= self.num_blocks
        assert all(slot < self._reserved for slot in live | self._freed)
        assert self.num_free_blocks + self.num_used_blocks + self.num_cached_blocks == self.num_blocks
        if self.mode == "indirect":
            assert sorted(self._free) == [slot for slot in range(self._reserved) if slot not in live]
            return
        window = {(self._base + i) % self._reserved for i in range(self._width)}
        assert len(window) == self._width
        assert live <= window
        if self.mode == "off":
            assert window == live | self._dead.keys()
            assert self._left.keys() == set(self._dead.values())
        elif not self._left:
            assert window == live

    def _take(self) -> int | None:
        if self.mode == "indirect":
            if not self._free and not self._grow():
                return None
            return heapq.heappop(self._free)
        if self._width == self._reserved and not self._grow():
            return None
        slot = (self._base + self._width) % self._reserved
        self._width += 1
        return slot

    def _grow(self) -> bool:
        """Reserve half as much again. Called when the ring is full, so its window may as well start at 0."""
        old = self._reserved
        if old == self.num_blocks:
            return False
        self._reserved = min(self.num_blocks, _times_one_and_a_half(old))
        self._base = 0
        if self.mode == "indirect":
            self._free = list(range(old, self._reserved))
        return True

    def _evict_edges(self) -> list[str]:
        """Mode off: shrink the window while a slot at either edge is dead."""
        evicted = []
        for edge, step in ((0, 1), (-1, 0)):
            while self._width:
                slot = (self._base + (edge and self._width - 1)) % self._reserved
                if slot not in self._dead:
                    break
                self._base = (self._base + step) % self._reserved
                self._width -= 1
                key = self._dead.pop(slot)
                del self._left[key]
                self._freed.add(slot)
                evicted.append(key)
        return evicted

    def _plan(self, num_tokens: Mapping[str, int], reserved: int) -> list[RowMove]:
        """The moves of one reordering; the tail is given back if `reserved` is below the current one."""
        shrink = reserved < self._reserved
        if self.mode == "indirect" and not shrink:
            return []
        num_live = len(self._slot_of)
        slots = np.fromiter(self._slot_of.values(), np.int64, num_live)
        lens = np.zeros(self._reserved, np.int64)  # [reserved]
        live = np.zeros(self._reserved, np.bool_)
        lens[slots] = np.fromiter(map(num_tokens.__getitem__, self._slot_of), np.int64, num_live)
        live[slots] = True
        if self.mode == "indirect":  # only what lies in the tail has to move
            return plan_moves(lens, live, fixed_base=0, width=reserved)[1]
        self._base, moves = plan_moves(lens, live, fixed_base=0 if shrink else None)
        self._width = num_live
        return moves

    def _apply(self, moves: list[RowMove]) -> dict[str, int]:
        relocated = {}
        for src, dst, _ in moves:
            key = self._key_at[src]
            assert key is not None
            assert self._key_at[dst] is None
            relocated[key] = self._slot_of[key] = dst
            self._key_at[src], self._key_at[dst] = None, key
            self._freed.discard(dst)
            self._freed.add(src)
        return relocated

    def _give_back(self, reserved: int) -> None:
        """Drop the tail, where nothing lives any more: it has no contents to poison and no slots to give."""
        self._reserved = reserved
        self._freed = {slot for slot in self._freed if slot < reserved}
        if self.mode == "indirect":
            self._free = [slot for slot in range(reserved) if self._key_at[slot] is None]


def _times_one_and_a_half(count: int) -> int:
    return (3 * count + 1) // 2
