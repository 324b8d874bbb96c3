"""Request-level batching: which requests make a batch, and when."""

from __future__ import annotations

import pytest

from flover.bench.batcher import BatchQueue


def filled(delay: float, max_batch: int, arrivals: list[float], preferred: tuple[int, ...] = ()) -> BatchQueue:
    queue = BatchQueue(delay, max_batch, preferred)
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


def test_the_largest_preferred_size_that_is_reached_goes_at_once() -> None:
    queue = filled(2.0, 8, [0.0] * 7, preferred=(2, 4))
    assert queue.pop(0.1) == [0, 1, 2, 3]
    assert queue.pop(0.1) == [4, 5]
    assert queue.pop(0.1) == []
    assert queue.pop(2.0) == [6]


def test_once_the_delay_is_over_more_than_a_preferred_size_goes() -> None:
    assert filled(2.0, 8, [0.0] * 7, preferred=(2, 4)).pop(2.0) == list(range(7))


@pytest.mark.parametrize(
    ("delay", "max_batch", "preferred", "named"),
    [(-1.0, 4, (), "-1.0"), (float("nan"), 4, (), "nan"), (0.0, 0, (), "0"), (0.0, 4, (5,), "5"), (0.0, 4, (0,), "0")],
)
def test_bad_settings_are_refused(delay: float, max_batch: int, preferred: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BatchQueue(delay, max_batch, preferred)
