"""The contract between the scheduler and a KV layout: who holds which block, what to copy, what is garbage.

The device store of every layer is `[num_blocks * block_size, kv_heads, head_dim]`. A paged request owns a
table of blocks; a slab is the case where one block is one slot (`block_size` is the longest request) and a
table has one entry. A layout is pure bookkeeping: it decides, and the caller carries the decisions to the
device. Within one step in this order:

    host    extend, leave  ->  reorder  ->  fork, join  ->  drain_freed
    device  map [0, num_reserved_blocks)  ->  moves  ->  poison what was drained  ->  copies  ->  forward

Invariant of every layout: free + used + cached == num_blocks, and no two live requests share a token that one
of them may write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class RowMove(NamedTuple):
    """Copy the first `num_tokens` tokens of block (or slot) `src` to block `dst`, in all layers."""

    src: int
    dst: int
    num_tokens: int


class Grant(NamedTuple):
    """What a join, fork or extend gave: block-table entries from `start` on, and the capacity.

    `capacity` is how many tokens the request can hold now, `num_cached_tokens` how many of the first are
    present already, `copies` what to copy into its own blocks before the step (copy-on-write). A tuple, as
    it is made for many rows a step: a frozen dataclass takes three times as long.
    """

    start: int
    block_ids: list[int]
    capacity: int
    num_cached_tokens: int = 0
    copies: tuple[RowMove, ...] = ()


@dataclass(frozen=True, slots=True)
class Reordering:
    """What a step's reordering asks for: the paper's "memory shuffle" (arXiv 2305.13484).

    No `dst` is a `src` of the same list, so the moves may run in any order or at once. `relocated` maps a
    moved key to its new slot, `evicted` names the keys whose row may go now. Blocks `[0, reserved_blocks)`
    stay backed by memory and the tail may be given back after the moves; a later join can raise it again
    (`num_reserved_blocks`).
    """

    moves: list[RowMove]
    relocated: dict[str, int]
    evicted: list[str]
    reserved_blocks: int


class KVLayout(Protocol):
    """A host allocator. Keys name requests; one that is live, or not evicted yet, must not join."""

    num_blocks: int
    block_size: int  # tokens

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of that length could ever be held, alone."""

    def join(self, key: str, token_ids: Sequence[int], *, salt: str, use_cache: bool, headroom: int) -> Grant | None:
        """Give `key` room for all of `token_ids` (at least one), or None.

        `salt` separates prefix caches, `use_cache=False` keeps the request out of them, both ways. At least
        one token is always left to compute. None unless `headroom` blocks, cached ones included, remain
        available afterwards.
        """

    def fork(self, src: str, key: str, num_tokens: int) -> Grant | None:
        """Start `key` from the first `num_tokens` tokens of `src`, all computed but the last, or None."""

    def extend(self, key: str, num_tokens: int) -> Grant | None:
        """Make room for `num_tokens` in all.

        To be called when `num_tokens` exceeds the capacity. None when blocks run out; nothing was taken then.
        """

    def commit(self, key: str, token_ids: Sequence[int], num_tokens: int) -> None:
        """The first `num_tokens` ids are known, and computed or scheduled: full blocks become reusable."""

    def leave(self, key: str, discard: bool = False) -> None:
        """`key` finished or is preempted. `discard`: its contents are bad (NaN) and must not be reused."""

    def reorder(self, num_tokens: Mapping[str, int]) -> Reordering:
        """Close holes, once a step, after leaves and before joins; `num_tokens` is each live key's prefix."""

    def drain_freed(self) -> list[int]:
        """Blocks whose contents became garbage since the last call, for debug poisoning. O(number freed).

        A block may have a new owner already, who has written nothing: call it each step, or never.
        """

    def reset_cache(self) -> None:
        """Forget every cached prefix; nothing computed before this call is matched after it."""

    def check(self) -> None:
        """Assert every invariant. O(num_blocks), for tests and debug runs."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some request holds."""

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that no request holds and that can be matched or evicted; available like free ones."""

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks `[0, num_reserved_blocks)` must be backed by memory this step; read it after the joins."""
