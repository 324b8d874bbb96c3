"""Request-level batching as NVIDIA Triton's dynamic batcher does it: which requests make a batch, and when.

Pure: it has no clock and no engine; whoever drives it says what time it is. Source: Triton's model configuration,
"Dynamic Batcher" (`max_queue_delay_microseconds`).
"""

from __future__ import annotations

from collections import deque


class BatchQueue:
    """Requests wait until they are a batch, first come, first served.

    Args:
        delay: seconds that the oldest may wait for company; 0: whatever waits is a batch.
        max_batch: no batch is larger, and one as large goes at once.
    """

    def __init__(self, delay: float, max_batch: int) -> None:
        self.delay, self.max_batch = delay, max_batch
        self._waiting: deque[tuple[float, int]] = deque()  # arrival, who

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, who: int, arrival: float) -> None:
        self._waiting.append((arrival, who))

    @property
    def due(self) -> float | None:
        """When the oldest has waited long enough; None: nobody waits."""
        return self._waiting[0][0] + self.delay if self._waiting else None

    def pop(self, now: float) -> list[int]:
        """The batch that goes to an instance that is free at `now`; empty: not yet."""
        size = min(len(self._waiting), self.max_batch)
        if self.due is None or (now < self.due and size < self.max_batch):
            return []
        return [self._waiting.popleft()[1] for _ in range(size)]
