"""Whether the engine makes progress. Plain; the clock is the caller's.

Time counts only as far as the caller itself ran: one who was stopped for a minute has not watched for a minute.
"""

from __future__ import annotations

MAX_TICK = 1.0


class Watchdog:
    """`stalled`: seconds that the engine has had work, and did nothing."""

    def __init__(self) -> None:
        self.stalled = 0.0
        self._progress = -1
        self._last: float | None = None

    def tick(self, now: float, has_work: bool, progress: int) -> None:
        """progress: any number that changes with every step."""
        elapsed = 0.0 if self._last is None else min(now - self._last, MAX_TICK)
        self._last = now
        if not has_work or progress != self._progress:
            self.stalled = 0.0
        else:
            self.stalled += elapsed
        self._progress = progress
