"""Systems that are this engine under a policy: `serial` and `fused`, and `dynamic` behind a queue.

Token times are those at which the host has the token. Nothing is served before it arrives; a request has arrived when
it should have, whenever the loop comes to see it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from flover.bench.batcher import BatchQueue
from flover.bench.records import Job, Record, Run, Watch
from flover.bench.reorder_clock import ReorderClock
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.metrics import StepStats
from flover.request import FinishReason, Request, RowSampling
from flover.resolve import DEFAULT_MAX_NUM_SEQS

BEST = 20  # tokens whose logits are looked at


def wait_until(moment: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Sleep to a moment of the clock: long sleeps overshoot, so the last millisecond is slept in small pieces."""
    while (left := moment - clock()) > 0:
        time.sleep(left - 1e-3 if left > 2e-3 else min(left, 1e-4))


def as_request(index: int, job: Job) -> Request:
    """Greedy, and to its length: no id ends it."""
    return Request(str(index), list(job.prompt), RowSampling(seed=0, temperature=0.0), job.num_output)


def new_records(jobs: Sequence[Job]) -> list[Record]:
    return [Record(job.arrival, len(job.prompt)) for job in jobs]


def take_finished(request: Request, record: Record) -> None:
    record.token_ids, record.error = request.output_token_ids, request.error
    record.num_preemptions = request.num_preemptions


def shift(steps: Sequence[StepStats], origin: float) -> None:
    """Step times, from the engine's clock to the run's."""
    for stats in steps:
        stats.start, stats.end = stats.start - origin, stats.end - origin


def abandon(core: EngineCore, requests: Sequence[Request]) -> None:
    """Withdraw what is in flight, after an interruption, so that the engine can run again."""
    for request in requests:
        if not request.finished:
            core.finish(request.request_id, FinishReason.ABORT)
    while core.has_unfinished():
        core.step()


def release() -> None:
    """Memory that nothing refers to any more, back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Parting(NamedTuple):
    """Where two runs part: what both have, and the next token of each."""

    token_ids: list[int]
    theirs: int
    ours: int


def logit_gaps(core: EngineCore, partings: Sequence[Parting]) -> list[float | None]:
    """How much more the logit of `theirs` is than that of `ours`; None: one is not among the `BEST`.

    The model is given what both have as a prompt; nothing else may run.
    """
    sampling = RowSampling(seed=0, temperature=0.0, logprobs=BEST)
    asked = [Request(str(i), list(p.token_ids), sampling, 1, logprobs=[]) for i, p in enumerate(partings)]
    for request in asked:
        core.add(request)
    while core.has_unfinished():
        core.step()
    gaps: list[float | None] = []
    for request, (_, theirs, ours) in zip(asked, partings):
        best = request.logprobs[0] if request.logprobs else {}
        both = theirs in best and ours in best
        gaps.append(best[theirs].logprob - best[ours].logprob if both else None)
    return gaps


class Feed(Protocol):
    """Hands jobs to the engine."""

    def take(self, now: float, idle: bool) -> list[int]:
        """The jobs to add now. idle: the engine has nothing to do."""
        ...

    @property
    def next(self) -> float | None:
        """When an idle engine gets the next; None: never, there are no more."""
        ...


class Arrivals:
    """Each job when it arrives."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._given = jobs, 0

    def take(self, now: float, idle: bool) -> list[int]:
        start = self._given
        while self._given < len(self._jobs) and self._jobs[self._given].arrival <= now:
            self._given += 1
        return list(range(start, self._given))

    @property
    def next(self) -> float | None:
        return self._jobs[self._given].arrival if self._given < len(self._jobs) else None


class Batches:
    """Jobs in the batches of a queue, each when the one before has left."""

    def __init__(self, jobs: Sequence[Job], queue: BatchQueue) -> None:
        self._jobs, self._arrivals, self._queue = jobs, Arrivals(jobs), queue
        self.batches: list[list[int]] = []

    def take(self, now: float, idle: bool) -> list[int]:
        for i in self._arrivals.take(now, idle):
            self._queue.push(i, self._jobs[i].arrival)
        batch = self._queue.pop(now) if idle else []
        if batch:
            self.batches.append(batch)
        return batch

    @property
    def next(self) -> float | None:
        moments = [moment for moment in (self._arrivals.next, self._queue.due) if moment is not None]
        return min(moments, default=None)


class EngineSystem:
    """This engine. config: policy and rows as the system is meant to have them.

    Raises:
        ValueError: as `EngineCore`.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self.core = EngineCore(config)

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `records.System.run`.

        Raises:
            ValueError: a job that is too long for the context or the cache; nothing has run then.
        """
        return self._run(jobs, Arrivals(jobs), watch)

    def _run(self, jobs: Sequence[Job], feed: Feed, watch: Watch) -> Run:
        run = Run(self.name, new_records(jobs))
        requests = [as_request(i, job) for i, job in enumerate(jobs)]
        for request in requests:
            self.core.check(request)
        self.core.scheduler.kv.reset_cache()  # every run finds the engine as it was when it was made
        if watch is not None:
            watch(run.records)
        with ReorderClock(self.core) as clock:
            self._serve(run, requests, jobs, feed)
        run.reorder_host, run.reorder_device = clock.host_seconds, clock.device_seconds
        return run

    def _serve(self, run: Run, requests: Sequence[Request], jobs: Sequence[Job], feed: Feed) -> None:
        core = self.core
        origin = core.clock()
        try:
            while feed.next is not None or core.has_unfinished():
                for i in feed.take(core.clock() - origin, not core.has_unfinished()):
                    requests[i].arrival_time = origin + jobs[i].arrival
                    core.add(requests[i])
                if not core.has_unfinished():
                    assert feed.next is not None, "nothing was taken, so something is still to come"
                    wait_until(origin + feed.next, core.clock)
                    continue
                output = core.step()
                if output.stats is not None:
                    run.steps.append(output.stats)
                    for request in output.requests:
                        run.records[int(request.request_id)].times.append(output.stats.end - origin)
                for request in output.finished:
                    take_finished(request, run.records[int(request.request_id)])
        finally:
            abandon(core, requests)
        shift(run.steps, origin)

    def logit_gaps(self, partings: Sequence[Parting]) -> list[float | None]:
        """`logit_gaps`, of this engine."""
        return logit_gaps(self.core, partings)

    def close(self) -> None:
        self.core.shutdown()
        del self.core
        release()


class DynamicSystem(EngineSystem):
    """Batches of a `BatchQueue` that join together and leave together: a finished row computes on until the last ends.

    No prompt is padded to its batch's longest, which is kinder than FasterTransformer without ragged input.

    Args:
        delay, preferred, max_batch: `BatchQueue`; max_batch is max_num_seqs unless given.
        stream: False: a request's tokens are all there when its batch ends, as behind Triton without decoupled mode;
            True: each when it is made.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        delay: float,
        preferred: Sequence[int] = (),
        stream: bool = False,
        max_batch: int | None = None,
    ) -> None:
        self.max_batch = max_batch or config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
        self.delay, self.preferred, self.stream = delay, preferred, stream
        self._queue()  # refuses bad sizes before a model is loaded
        super().__init__(name, replace(config, policy="static", max_num_seqs=self.max_batch))

    def _queue(self) -> BatchQueue:
        return BatchQueue(self.delay, self.max_batch, self.preferred)

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `EngineSystem.run`."""
        feed = Batches(jobs, self._queue())
        run = self._run(jobs, feed, watch)
        if not self.stream:
            for batch in feed.batches:
                records = [run.records[i] for i in batch]
                end = max((record.times[-1] for record in records if record.times), default=0.0)
                for record in records:
                    record.times = [end] * len(record.times)
        return run
