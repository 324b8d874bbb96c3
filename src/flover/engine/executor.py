"""The executors: take plans at once, and work them off in order, on a thread of their own or on a GPU.

`submit` encodes the plan and returns a future; the worker decodes it, so a plan is complete by construction: what the
encoding does not carry does not reach the device. A masked plan has two phases: `submit` runs it up to the logits, and
`sample`, before any other plan, draws. When a plan fails, those submitted after it are cancelled until
`reset`, since they were made in the belief that it would succeed.

The worker also builds the runner, so that one thread does all of torch's work: with a second one, OpenMP has more
threads than cores, puts idle ones to sleep after every parallel region, and a step takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

from flover.engine.batch import BatchPlan, RowMasks, StepResult, decode_masks, decode_plan, encode_masks, encode_plan

T = TypeVar("T")


class Pending(Protocol):
    def result(self, timeout: float | None = None) -> StepResult: ...


Phase = Callable[[bytes], StepResult | Pending | None]


class Runner(Protocol):
    def execute(self, plan: BatchPlan) -> StepResult | Pending: ...
    def launch(self, plan: BatchPlan) -> None: ...
    def sample(self, masks: RowMasks | None) -> StepResult | Pending: ...
    def warm_up(self, seconds: float) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


class PlanCancelledError(RuntimeError):
    """An earlier plan failed, so this one was not run."""


class LazyFuture(Future[StepResult]):
    """The future of a step whose `result` finds the result when it is asked for."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            self.result()
        except Exception as error:
            return error
        return None


class _Launched(LazyFuture):
    """Of a step that a device works on already."""

    def __init__(self, pending: Pending) -> None:
        super().__init__()
        self._pending = pending

    def result(self, timeout: float | None = None) -> StepResult:
        return self._pending.result(timeout)


class _Phases:
    """A runner's plans in order, whole or in two phases; after a failure none until `reset`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._failed = False
        self._launch_error: Exception | None = None  # of the masked plan that waits for its masks

    def run(self, data: bytes) -> StepResult | Pending | None:
        """A whole plan; of a masked one the first phase, whose error the second one raises."""
        if self._failed:
            raise PlanCancelledError("cancelled: an earlier step failed")
        plan = decode_plan(data)
        try:
            if not plan.masked:
                return self._runner.execute(plan)
            self._runner.launch(plan)
        except Exception as error:
            self._failed = True
            if not plan.masked:
                raise
            self._launch_error = error
        return None

    def sample(self, data: bytes) -> StepResult | Pending:
        error, self._launch_error = self._launch_error, None
        if error is not None:
            raise error
        if self._failed:
            raise PlanCancelledError("cancelled: an earlier step failed")
        try:
            return self._runner.sample(decode_masks(data))
        except Exception:
            self._failed = True
            raise

    def reset(self) -> None:
        self._runner.reset()
        self._failed, self._launch_error = False, None


class _Executor:
    """What the two have in common: plans and masks go to the phases, encoded; where these run is the subclass's."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._phases = runner, _Phases(runner)

    def submit(self, plan: BatchPlan) -> Future[StepResult]:
        """Take a plan; what goes wrong is in the future. The future of a masked plan is `sample`'s."""
        return self.launch(encode_plan(plan))

    def launch(self, data: bytes) -> Future[StepResult]:
        """The same for an encoded plan."""
        return self._run(self._phases.run, data)

    def sample(self, masks: RowMasks) -> Future[StepResult]:
        """Draw the tokens of the masked plan that was submitted last."""
        return self.draw(encode_masks(masks))

    def draw(self, data: bytes) -> Future[StepResult]:
        """The same for encoded masks."""
        return self._run(self._phases.sample, data)

    def _run(self, phase: Phase, data: bytes) -> Future[StepResult]:
        raise NotImplementedError


class InlineExecutor(_Executor):
    """For a runner that only enqueues: the caller's thread launches, the device is the worker."""

    def _run(self, phase: Phase, data: bytes) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            result = phase(data)
            if result is not None and not isinstance(result, StepResult):
                return _Launched(result)
            future.set_result(result)  # type: ignore[arg-type]  # None: of a masked plan, nobody looks at it
        except Exception as error:
            future.set_exception(error)
        return future

    def warm_up(self, seconds: float) -> None:
        self._runner.warm_up(seconds)

    def reset(self) -> None:
        self._phases.reset()

    def shutdown(self, wait: bool = True) -> None:
        """Nothing to stop, but what the runner has recorded goes."""
        self._runner.close()


class _Worker:
    """A thread that calls functions in order. It keeps no process alive, should it hang."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True, name="flover-executor")
        self._thread.start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, function, args))
        return future

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)
            del call, future, function, args  # while it waits it holds nothing

    def shutdown(self, wait: bool) -> None:
        while not self._calls.empty():
            if (call := self._calls.get()) is not None:
                call[0].cancel()
        self._calls.put(None)
        if wait:
            self._thread.join()


class ThreadExecutor(_Executor):
    """One worker thread, one runner, plans in order.

    Args:
        make_runner: called on the worker; what it raises, the constructor raises.
    """

    def __init__(self, make_runner: Callable[[], Runner]) -> None:
        self._worker = _Worker()
        super().__init__(self._worker.submit(make_runner).result())

    def _run(self, phase: Phase, data: bytes) -> Future[StepResult]:
        return self._worker.submit(self._work, phase, data)

    @staticmethod
    def _work(phase: Phase, data: bytes) -> StepResult:
        result = phase(data)
        return result if isinstance(result, StepResult) or result is None else result.result()  # type: ignore[return-value]

    def warm_up(self, seconds: float) -> None:
        """See the runner's."""
        self._worker.submit(self._runner.warm_up, seconds).result()

    def reset(self) -> None:
        """After a failure, once every future has been seen: the runner forgets all rows and accepts plans again."""
        self._worker.submit(self._phases.reset).result()

    def shutdown(self, wait: bool = True) -> None:
        """Drop what is queued. wait: for the step that runs."""
        self._worker.shutdown(wait)
