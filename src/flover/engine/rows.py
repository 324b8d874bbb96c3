"""The row table: the running batch as arrays. Live rows are always `[0, len(table))`.

One array row per quantity, so that closing the holes that leavers make is one gather. Rows above the new count fill the
holes below it: as few relocations as there are holes.
"""

from __future__ import annotations

import numpy as np

from flover.engine.batch import IntArray
from flover.request import Request


class RowTable:
    """Requests by row, and per row the tokens computed (optimistic), to prefill, to compute in all, and that fit.

    A dead row's request is over but its row still computes (reorder "off", policy "static").
    """

    def __init__(self, max_rows: int) -> None:
        self.requests: list[Request] = []
        self.token_ids: list[list[int]] = []  # each request's own list, to append to
        self._state = np.zeros((6, max_rows), dtype=np.int64)
        self._stop_ids = np.full((1, max_rows), -1, dtype=np.int64)  # [most stop ids of any row, rows], -1: none

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def computed(self) -> IntArray:
        return self._state[0, : len(self.requests)]

    @property
    def prefill(self) -> IntArray:
        return self._state[1, : len(self.requests)]

    @property
    def limit(self) -> IntArray:
        return self._state[2, : len(self.requests)]

    @property
    def capacity(self) -> IntArray:
        return self._state[3, : len(self.requests)]

    @property
    def arrival(self) -> IntArray:
        return self._state[4, : len(self.requests)]

    @property
    def dead(self) -> IntArray:
        return self._state[5, : len(self.requests)]

    @property
    def stop_ids(self) -> IntArray:
        return self._stop_ids[:, : len(self.requests)]

    def append(self, request: Request, *, computed: int, limit: int, capacity: int) -> None:
        """A request joins behind the last row."""
        row = request.row = len(self.requests)
        self.requests.append(request)
        self.token_ids.append(request.token_ids)
        self._state[:, row] = computed, len(request.token_ids), limit, capacity, request.arrival, 0
        ids = list(request.stop_token_ids)
        missing = len(ids) - self._stop_ids.shape[0]
        if missing > 0:
            more = np.full((missing, self._stop_ids.shape[1]), -1, dtype=np.int64)
            self._stop_ids = np.concatenate((self._stop_ids, more))
        self._stop_ids[:, row] = -1
        self._stop_ids[: len(ids), row] = ids

    def remove(self, leaves: list[int]) -> list[tuple[int, int]]:
        """Rows (ascending) go, the others close up; the relocations (src, dst) that it took."""
        if not leaves:
            return []
        requests, count = self.requests, len(self.requests) - len(leaves)
        gone = set(leaves)
        holes = [row for row in leaves if row < count]
        sources = [row for row in range(count, len(requests)) if row not in gone]
        for row in leaves:
            requests[row].row = -1
        for src, dst in zip(sources, holes):
            requests[dst], self.token_ids[dst] = requests[src], self.token_ids[src]
            requests[dst].row = dst
        self._state[:, holes] = self._state[:, sources]
        self._stop_ids[:, holes] = self._stop_ids[:, sources]
        del requests[count:], self.token_ids[count:]
        return list(zip(sources, holes))
