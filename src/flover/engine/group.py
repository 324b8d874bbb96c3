"""`GroupExecutor`: hands every plan to all ranks of a group and to the executor of this one, rank 0."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

from flover.engine.batch import BatchPlan, RowMasks, StepResult, encode_masks, encode_plan
from flover.engine.digest import RowDigest
from flover.engine.executor import LazyFuture
from flover.engine.links import TICK, GroupDeadError, Ranks
from flover.engine.wire import Masks, Plan, WarmUp


class LocalExecutor(Protocol):
    """What `GroupExecutor` needs of this rank's executor (`engine.executor`)."""

    def launch(self, data: bytes) -> Future[StepResult]: ...
    def draw(self, data: bytes) -> Future[StepResult]: ...
    def warm_up(self, seconds: float) -> None: ...
    def shutdown(self, wait: bool) -> None: ...


class _Watched(LazyFuture):
    """Of a step that all ranks compute: it ends when this rank's does, or with the group.

    A result that came once a rank was lost means nothing: whoever waited for that rank waited no longer.
    """

    def __init__(self, step: Future[StepResult], ranks: Ranks) -> None:
        super().__init__()
        self._step, self._ranks = step, ranks

    def result(self, timeout: float | None = None) -> StepResult:
        while True:
            try:
                result = self._step.result(timeout=TICK)
                self._ranks.check()
                return result
            except FutureTimeout:
                self._ranks.check()
            except GroupDeadError:
                raise
            except Exception as error:  # ranks that go on without this one would wait for it
                self._ranks.wait_for_failure(1.0)
                self._ranks.fail(f"rank 0 failed: {type(error).__name__}: {error}")
                raise GroupDeadError(self._ranks.failure) from error


class GroupExecutor:
    """Every plan goes to every rank with its number and the digest of what it leads to, and to this rank's executor.

    Args:
        ranks: the others, whose runners are ready. local: this rank's. leave: of the process group.
    """

    def __init__(self, ranks: Ranks, local: LocalExecutor, max_rows: int, leave: Callable[[], None]) -> None:
        self._ranks, self._local, self._leave = ranks, local, leave
        ranks.serving = True
        ranks.when_lost = leave  # a device that waits for a lost rank waits no longer
        self._digest = RowDigest(max_rows)
        self._sequence = 0
        self._last: _Watched | None = None

    @property
    def _runner(self) -> Any:
        """This rank's, as of the other executors (`bound.runner_of`)."""
        return getattr(self._local, "_runner", None)

    def submit(self, plan: BatchPlan) -> Future[StepResult]:
        """Hand a plan over; what goes wrong on any rank is in the future."""
        data = encode_plan(plan)
        self._ranks.broadcast(Plan(self._sequence, self._digest.advance(plan), data))
        self._sequence += 1
        return self._watched(self._local.launch(data))

    def sample(self, masks: RowMasks) -> Future[StepResult]:
        """Draw the tokens of the masked plan that was submitted last, on every rank."""
        data = encode_masks(masks)
        self._ranks.broadcast(Masks(data))
        return self._watched(self._local.draw(data))

    def _watched(self, step: Future[StepResult]) -> Future[StepResult]:
        self._last = _Watched(step, self._ranks)
        return self._last

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call it once a rank is lost, also while no step runs that would say so."""

        def lost() -> None:
            call()
            self._leave()

        self._ranks.when_lost = lost

    def warm_up(self, seconds: float) -> None:
        """See the runner's; ranks agree on when the time is over."""
        self._ranks.broadcast(WarmUp(seconds))
        self._local.warm_up(seconds)

    def reset(self) -> None:
        """A group that has failed is not used again."""
        self._ranks.check()

    def shutdown(self) -> None:
        """After the plans that were handed over, since the other ranks run them too."""
        if self._last is not None:
            self._last.exception()
        self._local.shutdown(wait=not self._ranks.failure)  # first: NCCL waits for graphs that hold its collectives
        self._ranks.close()
        self._leave()
