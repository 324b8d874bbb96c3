"""The executors: take plans at once, and work them off in order, on a thread of their own or on a GPU.

`submit` encodes the plan and returns a future; the worker decodes it, so a plan is complete by construction: what the
encoding does not carry does not reach the device. When a plan fails, those submitted after it are cancelled until
`reset`, since they were made in the belief that it would succeed.

The worker also builds the runner, so that one thread does all of torch's work: with a second one, OpenMP has more
threads than cores, puts idle ones to sleep after every parallel region, and a step takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from flover.engine.batch import BatchPlan, StepResult, decode_plan, encode_plan


class Pending(Protocol):
    def result(self) -> StepResult: ...


class Runner(Protocol):
    def execute(self, plan: BatchPlan) -> StepResult | Pending: ...
    def warm_up(self, seconds: float) -> None: ...
    def reset(self) -> None: ...


class PlanCancelledError(RuntimeError):
    """An earlier plan failed, so this one was not run."""


class _Launched(Future[StepResult]):
    """The future of a step that a device works on already; its result is read when it is asked for."""

    def __init__(self, pending: Pending) -> None:
        super().__init__()
        self._pending = pending

    def result(self, timeout: float | None = None) -> StepResult:
        return self._pending.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            self._pending.result()
        except Exception as error:
            return error
        return None


class InlineExecutor:
    """For a runner that only enqueues: the caller's thread launches, the device is the worker."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._failed = False

    def submit(self, plan: BatchPlan) -> Future[StepResult]:
        """Launch a plan; what goes wrong is in the future, also here."""
        future: Future[StepResult] = Future()
        try:
            if self._failed:
                raise PlanCancelledError("cancelled: an earlier step failed")
            result = self._runner.execute(decode_plan(encode_plan(plan)))
            if not isinstance(result, StepResult):
                return _Launched(result)
            future.set_result(result)
        except Exception as error:
            self._failed = True
            future.set_exception(error)
        return future

    def warm_up(self, seconds: float) -> None:
        self._runner.warm_up(seconds)

    def reset(self) -> None:
        self._runner.reset()
        self._failed = False

    def shutdown(self) -> None:
        pass


class ThreadExecutor:
    """One worker thread, one runner, plans in order.

    Args:
        make_runner: called on the worker; what it raises, the constructor raises.
    """

    def __init__(self, make_runner: Callable[[], Runner]) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flover-executor")
        self._runner = self._worker.submit(make_runner).result()
        self._failed = False

    def submit(self, plan: BatchPlan) -> Future[StepResult]:
        """Queue a plan; the device works while the caller goes on."""
        return self._worker.submit(self._run, encode_plan(plan))

    def _run(self, data: bytes) -> StepResult:
        if self._failed:
            raise PlanCancelledError("cancelled: an earlier step failed")
        try:
            result = self._runner.execute(decode_plan(data))
            return result if isinstance(result, StepResult) else result.result()
        except BaseException:
            self._failed = True
            raise

    def warm_up(self, seconds: float) -> None:
        """See the runner's."""
        self._worker.submit(self._runner.warm_up, seconds).result()

    def reset(self) -> None:
        """After a failure, once every future has been seen: the runner forgets all rows and accepts plans again."""
        self._worker.submit(self._runner.reset).result()
        self._failed = False

    def shutdown(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
