"""Whether, and when, to start again what has died. Plain; the clock is the caller's."""

from __future__ import annotations

STEADY_SECONDS = 60.0  # who ran so long begins anew
MAX_DELAY = 30.0


class Restarts:
    """Delays of 0, 1, 2, 4, ... seconds; None after `limit` failures in a row."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_failures = limit, 0

    def failed(self, ran: float) -> float | None:
        """It has died after `ran` seconds of service; -> seconds to wait before the next start, None to give up."""
        if ran >= STEADY_SECONDS:
            self.num_failures = 0
        self.num_failures += 1
        if self.num_failures > self.limit:
            return None
        return 0.0 if self.num_failures == 1 else min(2.0 ** (self.num_failures - 2), MAX_DELAY)
