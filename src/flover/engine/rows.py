"""The row table: the running batch as arrays. Live rows are always `[0, len(table))`.

One array row per quantity, so that closing the holes that leavers make is one gather. Rows above the new count fill the
holes below it: as few relocations as there are holes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from flover.engine.batch import IntArray
from flover.request import Request

NEVER = np.iinfo(np.int64).max


class RowTable:
    """Requests by row, and arrays `[rows]`. A dead row's request is over but its row still computes (reorder "off",
    policy "static").
    """

    computed: IntArray  # tokens in the cache, optimistic
    prefill: IntArray  # of which known when the request joined
    limit: IntArray  # tokens to compute in all
    edge: IntArray  # where the row must be looked at again: its blocks are full, or its limit is reached
    arrival: IntArray
    dead: IntArray
    client: IntArray  # whose request it is, for fair sharing
    stop_ids: IntArray  # [most stop ids of any row, rows], -1: none

    def __init__(self, max_rows: int) -> None:
        self.requests: list[Request] = []
        self.token_ids: list[list[int]] = []  # each request's own list, to append to
        self._state = np.zeros((7, max_rows), dtype=np.int64)
        self._stop_ids = np.full((1, max_rows), -1, dtype=np.int64)
        self._view()

    def __len__(self) -> int:
        return len(self.requests)

    def _view(self) -> None:
        """The arrays end where the rows do."""
        k = len(self.requests)
        self.computed, self.prefill, self.limit, self.edge, self.arrival, self.dead, self.client = self._state[:, :k]
        self.stop_ids = self._stop_ids[:, :k]

    def append(self, request: Request, *, computed: int, limit: int, capacity: int, client: int = 0) -> None:
        """A request joins behind the last row."""
        row = request.row = len(self.requests)
        self.requests.append(request)
        self.token_ids.append(request.token_ids)
        self._state[:, row] = computed, len(request.token_ids), limit, min(capacity, limit), request.arrival, 0, client
        ids = list(request.stop_token_ids)
        missing = len(ids) - self._stop_ids.shape[0]
        if missing > 0:
            more = np.full((missing, self._stop_ids.shape[1]), -1, dtype=np.int64)
            self._stop_ids = np.concatenate((self._stop_ids, more))
        self._stop_ids[:, row] = -1
        self._stop_ids[: len(ids), row] = ids
        self._view()

    def bound(self, rows: list[int], capacities: list[int]) -> None:
        """Rows have got room for so many tokens."""
        self.edge[rows] = np.minimum(capacities, self.limit[rows])

    def freeze(self, rows: list[int]) -> None:
        """Rows die where they are: they compute on, but neither prefill nor advance to any edge."""
        self.dead[rows] = 1
        self.prefill[rows] = 0
        self.edge[rows] = NEVER

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
        self._view()
        return list(zip(sources, holes))


class Lengths(Mapping[str, int]):
    """key -> optimistic length, read from the row table only for the keys that a layout asks for."""

    def __init__(self, table: RowTable) -> None:
        self._rows = {request.key: request.row for request in table.requests}
        self._computed = table.computed

    def __getitem__(self, key: str) -> int:
        return int(self._computed[self._rows[key]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
