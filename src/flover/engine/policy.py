"""Policies order and admit; they never pack.

`fused` is temporal fusion: everyone who fits, at every step. `serial` (one request at a time) and `static` (a batch
joins together and leaves together) are what it is compared with, over the same kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from flover.request import Request

PRIORITY_SECONDS = 10.0  # of waiting that one step of priority is worth under order "fair": priorities age


@dataclass(frozen=True, slots=True)
class Policy:
    """name: fused, serial or static.

    order: fcfs, priority (lower first), shortest (prompt + output limit) or fair (clients share, see `queue`).
    """

    name: str = "fused"
    order: str = "fcfs"

    def admissible(self, num_rows: int, max_num_seqs: int, filling: bool = False) -> int:
        """How many requests may join now. filling: the step before had no tokens left for all who wanted to join."""
        if self.name == "fused" or (filling and self.holds_rows):
            return max_num_seqs - num_rows
        if num_rows:
            return 0
        return 1 if self.name == "serial" else max_num_seqs

    @property
    def holds_rows(self) -> bool:
        """Whether finished rows stay, and compute, until the whole batch is done."""
        return self.name == "static"

    def key(self, request: Request) -> float:
        """Waiting requests are taken by (key, arrival)."""
        if self.order == "fair":
            return request.arrival_time + PRIORITY_SECONDS * request.priority
        if self.order == "priority":
            return request.priority
        if self.order == "shortest":
            return request.num_prompt_tokens + request.max_output_tokens
        return 0
