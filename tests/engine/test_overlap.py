"""The overlap contract: at depth 1 a plan is submitted before the result in flight is read."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from harness import Job, as_request, echo_core

from flover.engine.batch import BatchPlan, StepResult, decode_plan, encode_plan
from flover.request import FinishReason


class RecordingExecutor:
    """Wraps an executor and writes down each submit and each first read of a result."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.log = inner, []

    def submit(self, plan: BatchPlan) -> Future[StepResult]:
        self.log.append(("submit", plan.step))
        future = self.inner.submit(plan)
        read = future.result

        def result(timeout: float | None = None) -> StepResult:
            self.log.append(("read", plan.step))
            return read(timeout)

        future.result = result  # type: ignore[method-assign]
        return future

    def reset(self) -> None:
        self.inner.reset()

    def shutdown(self) -> None:
        self.inner.shutdown()


def recorded(echo: Path, depth: int, **options: Any) -> tuple[Any, list[tuple[str, int]]]:
    core = echo_core(echo, overlap_depth=depth, **options)
    core._executor = recorder = RecordingExecutor(core._executor)
    return core, recorder.log


@pytest.mark.parametrize("options", [{}, {"kv_layout": "slab"}, {"prefill_mode": "separate"}])
def test_submit_precedes_the_read_of_the_result_before(echo: Path, options: dict[str, Any]) -> None:
    core, log = recorded(echo, 1, **options)
    for i in range(5):
        core.add(as_request(i, Job([i] * (3 + i), 10 + 3 * i)))
    while core.has_unfinished():
        core.step()
    last = max(step for _, step in log)
    for n in range(last):
        assert log.index(("submit", n + 1)) < log.index(("read", n)), f"step {n} was read before {n + 1} went out"


def test_depth_zero_reads_each_result_before_the_next_plan(echo: Path) -> None:
    core, log = recorded(echo, 0)
    core.add(as_request(0, Job([1, 2, 3], 6)))
    while core.has_unfinished():
        core.step()
    assert [kind for kind, _ in log][:8] == ["submit", "read"] * 4


def test_late_stop_is_in_at_most_one_more_plan(echo: Path) -> None:
    """A stop id is seen one step late: the row computes once more, and that token is dropped."""
    probe = echo_core(echo, overlap_depth=0)
    request = as_request(0, Job([4, 5, 6], 12))
    probe.add(request)
    while probe.has_unfinished():
        probe.step()
    stop = request.output_token_ids[5]
    for depth in (0, 1):
        core, _ = recorded(echo, depth, record_timeline=True)
        again = as_request(0, Job([4, 5, 6], 12, stop_ids=frozenset({stop})))
        core.add(again)
        computed = 0
        while core.has_unfinished():
            stats = core.step().stats
            computed += stats.num_decode_tokens if stats else 0
        first = request.output_token_ids.index(stop) + 1
        assert again.output_token_ids == request.output_token_ids[:first]
        assert again.finish_reason is FinishReason.STOP
        assert computed <= first - 1 + depth


def test_plans_survive_encoding(echo: Path) -> None:
    core = echo_core(echo, kv_layout="slab")
    plans = []
    submit = core._executor.submit
    core._executor.submit = lambda plan: (plans.append(plan), submit(plan))[1]  # type: ignore[method-assign]
    for i in range(6):
        core.add(as_request(i, Job([i] * 5, 3 + 4 * i)))
    while core.has_unfinished():
        core.step()
    assert any(plan.moves for plan in plans)
    for plan in plans:
        assert encode_plan(decode_plan(encode_plan(plan))) == encode_plan(plan)
        assert len(encode_plan(plan)) < 20_000
