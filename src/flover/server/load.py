"""How much there is to do, and who may add to it.

Counts rows (each choice of a prompt is one) and prompt tokens. Invariant: what is admitted fits the limits, or finds
an empty queue.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from flover.metrics import StepStats
from flover.server.errors import ApiError

RATE_SECONDS = 10.0  # over which the drain rate is measured
MAX_RETRY_AFTER = 60


class Rate:
    """Events per second, the older the less they count."""

    def __init__(self) -> None:
        self._sum, self._at = 0.0, time.monotonic()

    def add(self, amount: float) -> None:
        self._sum = self._decayed() + amount
        self._at = time.monotonic()

    def seconds(self, amount: float) -> str:
        """Whole seconds in which so many come, as Retry-After has them."""
        return str(max(1, min(math.ceil(amount / max(self._decayed() / RATE_SECONDS, 1e-3)), MAX_RETRY_AFTER)))

    def _decayed(self) -> float:
        return self._sum * math.exp((self._at - time.monotonic()) / RATE_SECONDS)


@dataclass(slots=True)
class Live:
    """A prompt that has not finished."""

    arrival: float  # of time.monotonic(), as the engine's clock
    rows: int
    prompt_tokens: int
    num_tokens: int = 0  # generated so far, over all rows
    last: float = 0.0  # when the last of them came
    choices: int = 1
    label: str = ""  # X-Request-Id
    why: str = "disconnect"  # it is withdrawn, should that happen


class Load:
    """The prompts that live, and the last step of the engine.

    Args:
        max_rows: of the engine's running batch.
        max_queued_requests, max_queued_tokens: rows, and prompt tokens of prompts without a first token, that may wait.
    """

    def __init__(self, max_rows: int, max_queued_requests: int, max_queued_tokens: int) -> None:
        self.max_rows = max_rows
        self.max_queued_requests, self.max_queued_tokens = max_queued_requests, max_queued_tokens
        self.live: dict[str, Live] = {}
        self.stats: StepStats | None = None  # of the last step
        self.rows = 0
        self.queued_tokens = 0
        self._row_rate, self._token_rate = Rate(), Rate()

    @property
    def waiting(self) -> int:
        """Rows without a place in the batch; new ones are taken to find one where there is room."""
        stats = self.stats
        return max(0, self.rows - (stats.num_running if stats is not None and stats.num_waiting else self.max_rows))

    @property
    def running(self) -> int:
        return self.rows - self.waiting

    def check(self, rows: int, tokens: int) -> None:
        """Raises:
        ApiError: 429 with Retry-After, if so much more does not fit the queue.
        """
        over_rows = self.waiting + rows - self.max_queued_requests
        over_tokens = self.queued_tokens + tokens - self.max_queued_tokens
        if over_rows > 0 and self.waiting:
            what = f"{self.waiting} requests wait, the limit is {self.max_queued_requests}"
            raise self._full(what, over_rows, self._row_rate)
        if over_tokens > 0 and self.queued_tokens:
            what = f"{self.queued_tokens} prompt tokens wait, the limit is {self.max_queued_tokens}"
            raise self._full(what, over_tokens, self._token_rate)

    def add(self, request_id: str, rows: int, tokens: int) -> None:
        self.live[request_id] = Live(time.monotonic(), rows, tokens, choices=rows)
        self.rows += rows
        self.queued_tokens += tokens

    def shrink(self, one: Live, rows: int) -> None:
        """Some choices of a prompt have ended: `rows` are left."""
        self.rows -= one.rows - rows
        one.rows = rows

    def started(self, one: Live) -> None:
        """A prompt got its first token."""
        self.queued_tokens -= one.prompt_tokens
        self._row_rate.add(one.rows)
        self._token_rate.add(one.prompt_tokens)

    def remove(self, request_id: str) -> Live:
        one = self.live.pop(request_id)
        self.rows -= one.rows
        if not one.num_tokens:
            self.queued_tokens -= one.prompt_tokens
        if not self.live:  # no step will say so
            self.stats = None
        return one

    def retry_after(self, rows: float) -> str:
        """Whole seconds in which so many rows will have started, at the rate of late."""
        return self._row_rate.seconds(rows)

    def _full(self, what: str, over: int, rate: Rate) -> ApiError:
        headers = {"Retry-After": rate.seconds(over)}
        return ApiError(429, f"the queue is full: {what}", kind="rate_limit_error", code="queue_full", headers=headers)
