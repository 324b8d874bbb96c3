"""Request-level batching as NVIDIA Triton's dynamic batcher does it: which requests make a batch, and when.

Pure: it has no clock and no engine; whoever drives it says what time it is. Source: Triton's model configuration,
"Dynamic Batcher" (`preferred_batch_size`, `max_queue_delay_microseconds`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class BatchQueue:
    """Requests wait until they are a batch, first come, first served.

    Args:
        delay: seconds that the oldest may wait for company; 0: whatever waits is a batch.
        preferred: sizes that go at once, the largest that is reached; none: `max_batch` alone.
        max_batch: no batch is larger.

    Raises:
        ValueError: a negative delay, or a preferred size outside of [1, max_batch].
    """

    def __init__(self, delay: float, max_batch: int, preferred: Sequence[int] = ()) -> None:
        if not delay >= 0:
            raise ValueError(f"the queue delay must be at least 0 s, got {delay!r}")
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch!r}")
        for size in preferred:
            if not 1 <= size <= max_batch:
                raise ValueError(f"a preferred batch size must be in [1, {max_batch}], got {size!r}")
        self.delay, self.max_batch = delay, max_batch
        self.preferred = tuple(sorted(preferred, reverse=True)) or (max_batch,)
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
        due = self.due
        if due is None:
            return []
        size = min(len(self._waiting), self.max_batch)
        if now < due:
            size = next((wanted for wanted in self.preferred if wanted <= size), 0)
        return [self._waiting.popleft()[1] for _ in range(size)]
