"""Paged KV: fixed-size blocks, reference-counted, shared between requests with a common prefix.

Owns which request holds which block and which block can be found again by its tokens. Every block is in one
state: free, used (references > 0), or cached (no reference, but in the prefix index, so reusable until it is
evicted). Invariant: a block that is in the index or has two holders is full and never written again.

The index is a tree. The key of a node is (parent node, tokens of the block), where the parent of a first
block is the salt. Node ids are never used twice, so dict equality alone compares the whole prefix, two
prefixes cannot collide, and evicting a node makes its children unreachable: they age out. Block tables: vLLM
(arXiv 2309.06180), tree: SGLang's radix cache (arXiv 2312.07104), at block granularity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flover.kv.protocol import Grant, KVLayout, Reordering, RowMove

_Node: TypeAlias = int | str  # a node id, or the salt at the root
_Entry: TypeAlias = tuple[_Node, tuple[int, ...]]


@dataclass(slots=True)
class _Held:
    """One live request: its block table, and the tree nodes of its leading, committed blocks."""

    blocks: list[int]
    nodes: list[_Node]
    num_shared: int  # leading blocks shared through a fork, committed or not
    salt: str
    use_cache: bool


class PagedLayout(KVLayout):
    """Blocks of `block_size` tokens with prefix caching; `KVLayout` is the contract.

    Args:
        num_blocks: blocks of the device store.
        block_size: tokens per block.
        enable_prefix_caching: False keeps every request out of the index.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._requests: dict[str, _Held] = {}
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # no references, in the index; oldest first
        self._index: dict[_Entry, int] = {}
        self._entry: list[_Entry | None] = [None] * num_blocks  # the index key of each block
        self._node = [-1] * num_blocks  # node id of each block in the index
        self._next_node = 0
        self._left: dict[str, None] = {}  # keys to evict at the next reorder
        self._freed: set[int] = set()  # a set: bounded even if nobody drains it

    def fits(self, num_tokens: int) -> bool:
        return self._blocks_for(num_tokens) <= self.num_blocks

    def join(self, key: str, token_ids: Sequence[int], *, salt: str, use_cache: bool, headroom: int) -> Grant | None:
        assert key not in self._requests, key
        assert key not in self._left, key
        assert len(token_ids) > 0
        assert headroom >= 0
        available = len(self._free) + len(self._cached) - headroom
        if available < 1:  # the last token always needs a block of its own
            return None
        use_cache = use_cache and self.enable_prefix_caching
        blocks, nodes = self._match(token_ids, salt) if use_cache else ([], [])
        num_hits = len(blocks)
        num_fresh = self._blocks_for(len(token_ids)) - num_hits
        revived = [block for block in blocks if self._references[block] == 0]
        if num_fresh + len(revived) > available:
            return None
        for block in revived:  # before _take, which may evict
            del self._cached[block]
        for block in blocks:
            self._references[block] += 1
        blocks += self._take(num_fresh)
        self._requests[key] = _Held(blocks, nodes, 0, salt, use_cache)
        return Grant(0, list(blocks), len(blocks) * self.block_size, num_hits * self.block_size)

    def fork(self, src: str, key: str, num_tokens: int) -> Grant | None:
        """Share the full blocks before the last token, and copy the partial one into a fresh block."""
        assert key not in self._requests, key
        assert key not in self._left, key
        source = self._requests[src]
        num_shared, num_partial = divmod(num_tokens - 1, self.block_size)
        assert 0 < num_tokens <= len(source.blocks) * self.block_size + 1
        if not self._free and not self._cached:
            return None
        (fresh,) = self._take(1)
        blocks = source.blocks[:num_shared]
        for block in blocks:
            self._references[block] += 1
        copies = (RowMove(source.blocks[num_shared], fresh, num_partial),) if num_partial else ()
        blocks.append(fresh)
        source.num_shared = max(source.num_shared, num_shared)
        nodes = source.nodes[:num_shared]
        self._requests[key] = _Held(blocks, nodes, num_shared, source.salt, source.use_cache)
        return Grant(0, list(blocks), len(blocks) * self.block_size, num_tokens - 1, copies)

    def extend(self, key: str, num_tokens: int) -> Grant | None:
        held = self._requests[key]
        size = self.block_size
        start = len(held.blocks)
        count = -(-num_tokens // size) - start
        if count <= 0:
            return Grant(start, [], start * size)
        if count > len(self._free) + len(self._cached):
            return None
        taken = self._take(count)
        held.blocks += taken
        return Grant(start, taken, (start + count) * size)

    def commit(self, key: str, token_ids: Sequence[int], num_tokens: int) -> None:
        held = self._requests[key]
        assert num_tokens <= min(len(token_ids), len(held.blocks) * self.block_size)
        if not held.use_cache:
            return
        size, nodes = self.block_size, held.nodes
        for position in range(len(nodes), num_tokens // size):
            block = held.blocks[position]
            if self._entry[block] is None:  # else a fork of this request was first
                start = position * size
                entry = (nodes[-1] if nodes else held.salt, tuple(token_ids[start : start + size]))
                known = self._index.setdefault(entry, block)
                if known == block:
                    self._entry[block] = entry
                    self._node[block] = self._next_node
                    self._next_node += 1
                else:  # equal contents are there: the chain goes on through them, this copy stays private
                    block = known
            nodes.append(self._node[block])

    def leave(self, key: str, discard: bool = False) -> None:
        """As the contract says. `discard` drops shared blocks too: what went bad may have come with them."""
        held = self._requests.pop(key)
        self._left[key] = None
        references, entry = self._references, self._entry
        for block in reversed(held.blocks):  # so that the tail of a chain is evicted before its head
            references[block] -= 1
            if discard:
                self._unregister(block)
            if references[block] == 0:
                if entry[block] is None:
                    self._release(block)
                else:
                    self._cached[block] = None
        if discard and held.num_shared:  # a fork that has not committed what it shares must not do so later
            bad = set(held.blocks)
            for other in self._requests.values():
                if other.num_shared > len(other.nodes) and not bad.isdisjoint(other.blocks):
                    other.use_cache = False

    def reorder(self, num_tokens: Mapping[str, int]) -> Reordering:
        """A row move is a table edit, so nothing moves; every key that left is evicted."""
        evicted = list(self._left)
        self._left.clear()
        return Reordering([], {}, evicted, self.num_blocks)

    def drain_freed(self) -> list[int]:
        freed = list(self._freed)
        self._freed.clear()
        return freed

    def reset_cache(self) -> None:
        """As the contract says; live requests go on, and commit nothing more."""
        for block in self._index.values():
            self._entry[block] = None
        self._index.clear()
        for block in self._cached:
            self._release(block)
        self._cached.clear()
        for held in self._requests.values():
            held.use_cache = False

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def num_reserved_blocks(self) -> int:
        return self.num_blocks

    def check(self) -> None:
        references = [0] * self.num_blocks
        for key, held in self._requests.items():
            assert key not in self._left
            assert len(set(held.blocks)) == len(held.blocks), "a table names a block twice"
            assert len(held.nodes) <= len(held.blocks)
            for position, block in enumerate(held.blocks):
                references[block] += 1
                if self._references[block] > 1 or self._entry[block] is not None:
                    assert position < max(len(held.nodes), held.num_shared), "a shared block may be written"
        assert references == self._references
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached
        assert not free & used
        assert not cached & used
        assert len(free) + len(used) + len(cached) == self.num_blocks
        assert len(used) == self.num_used_blocks
        indexed = {block for block, entry in enumerate(self._entry) if entry is not None}
        assert indexed == set(self._index.values())
        assert len(indexed) == len(self._index)
        assert all(self._entry[block] == entry for entry, block in self._index.items())
        assert cached <= indexed <= cached | used

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(self, token_ids: Sequence[int], salt: str) -> tuple[list[int], list[_Node]]:
        """The longest cached chain of full blocks that leaves at least one token to compute."""
        size = self.block_size
        blocks: list[int] = []
        nodes: list[_Node] = []
        parent: _Node = salt
        for end in range(size, len(token_ids), size):
            block = self._index.get((parent, tuple(token_ids[end - size : end])))
            if block is None:
                break
            parent = self._node[block]
            blocks.append(block)
            nodes.append(parent)
        return blocks, nodes

    def _take(self, count: int) -> list[int]:
        """`count` fresh blocks, known to be available: free ones, then the least recently used cached."""
        free = self._free
        if count == 1 and free:  # decode
            block = free.pop()
            self._references[block] = 1
            return [block]
        while len(free) < count:
            block, _ = self._cached.popitem(last=False)
            self._unregister(block)
            self._release(block)
        taken = [free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _unregister(self, block: int) -> None:
        entry = self._entry[block]
        if entry is not None:
            del self._index[entry]
            self._entry[block] = None

    def _release(self, block: int) -> None:
        self._free.append(block)
        self._freed.add(block)
