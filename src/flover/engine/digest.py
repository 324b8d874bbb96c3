"""`RowDigest`: one number for what a rank must believe of its rows, by which ranks that disagree are found at once.

Every rank advances its own by each plan. It covers, per live row, the request, the tokens computed and every edit of
its block table, in order. Plain numpy, some ten microseconds a step.
"""

from __future__ import annotations

from array import array
from zlib import crc32

import numpy as np

from flover.engine.batch import BatchPlan, IntArray

REQUEST, COMPUTED, BLOCKS, FROZEN = range(4)
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
PLACE, HALF = np.uint64(0xD6E8FEB86659FD93), np.uint64(32)


class RowDigest:
    """max_rows: of the batch."""

    def __init__(self, max_rows: int) -> None:
        self._state = np.zeros((4, max_rows), dtype=np.int64)
        self._places = np.arange(1, max_rows + 1, dtype=np.uint64) * PLACE
        self._num_rows = 0
        self.value = 0

    @property
    def computed(self) -> IntArray:
        """Tokens computed of each live row, after the last plan."""
        return self._state[COMPUTED, : self._num_rows]

    def advance(self, plan: BatchPlan) -> int:
        """Take a plan in; -> the digest of what then holds."""
        state = self._state
        if plan.relocations:
            source, target = (list(rows) for rows in zip(*plan.relocations))
            state[:, target] = state[:, source]
        if plan.frozen:
            state[FROZEN, plan.frozen] = 1
        for join in plan.joins:
            state[:, join.row] = join.request, join.num_computed_tokens, 0, 0
        blocks = state[BLOCKS]
        for row, first, ids in plan.tables:
            blocks[row] = crc32(array("q", (first, *ids)), int(blocks[row]))
        n = self._num_rows = plan.num_rows
        state[COMPUTED, :n] += plan.scheduled() * (state[FROZEN, :n] == 0)
        mixed = FACTORS @ state[:FROZEN, :n].view(np.uint64) + self._places[:n]
        mixed ^= mixed >> HALF
        mixed *= PLACE
        self.value = int(np.bitwise_xor.reduce(mixed ^ (mixed >> HALF)))
        return self.value
