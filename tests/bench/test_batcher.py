"""Request-level batching: which requests make a batch, and when."""

from __future__ import annotations

import pytest

from flover.bench.batcher import BatchQueue


def filled(delay: float, max_batch: int, arrivals: list[float]) -> BatchQueue:
    queue = BatchQueue(delay, max_batch)
    for i, arrival in enumerate(arrivals):
        queue.push(i, arrival)
    return queue


def test_without_delay_whatever_waits_is_a_batch() -> None:
    queue = filled(0.0, 4, [0.0, 0.1, 0.2, 0.3, 0.4])
    assert queue.pop(0.5) == [0, 1, 2, 3]
    assert queue.pop(0.5) == [4]
    assert queue.pop(0.5) == []
    assert queue.due is None


@pytest.mark.parametrize("delay", [0.05, 2.0, 4.0, 8.0, 16.0])
def test_the_oldest_waits_as_long_as_it_may_and_takes_all_with_it(delay: float) -> None:
    queue = filled(delay, 32, [1.0, 1.0 + delay / 2, 1.0 + delay])
    assert queue.due == 1.0 + delay
    assert queue.pop(1.0 + 0.999 * delay) == []
    assert queue.pop(1.0 + delay) == [0, 1, 2]


def test_a_full_batch_goes_at_once_and_the_rest_waits_for_its_own_oldest() -> None:
    queue = filled(2.0, 2, [0.0, 0.5, 0.7])
    assert queue.pop(0.7) == [0, 1]
    assert queue.pop(0.7) == []
    assert queue.due == 2.7
    assert queue.pop(2.7) == [2]
