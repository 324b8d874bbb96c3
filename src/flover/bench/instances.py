"""Concurrent instances around the same weights: FasterTransformer behind Triton with `instance_group{count: N}`.

Each instance has a thread, the KV cache of one request and, on a GPU, its stream and its captured graphs of one row; a
free one takes the oldest waiting request and serves it to its end. Layers hold nothing of a request, so the instances
share one model.

On a CPU every instance computes on num_threads // N threads of OpenMP (at least one), which are its own. N = cores is
then faster than one request at a time on all cores; more instances are slower. An instance's thread does all of its
torch work, for the reason given in `engine.executor`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Protocol

import torch

from flover.bench.engines import (
    Parting,
    abandon,
    as_request,
    logit_gaps,
    new_records,
    release,
    shift,
    take_finished,
    wait_until,
)
from flover.bench.records import Job, Record, Run, Watch
from flover.config import EngineConfig, ResolvedConfig, human
from flover.engine.cuda_graph import WARM_UP_SECONDS
from flover.engine.engine import EngineCore, make_runner, settle, survey
from flover.engine.executor import InlineExecutor
from flover.metrics import StepStats
from flover.models.base import CausalLM
from flover.resolve import memory_share
from flover.startup import StartupTimes

DEFAULT_INSTANCES = 32  # as many as the paper has requests
LATER_WARM_UP_SECONDS = 0.5  # kernels are compiled by then, and the shapes of one row are few
CAPTURED_AFTER = 3  # times that a shape is met: computed, captured, replayed (`engine.cuda_graph`)


@dataclass(slots=True)
class Session:
    """A run, as the instances see it; each job is touched by the one that took it."""

    jobs: Sequence[Job]
    records: list[Record]
    origin: float
    waiting: SimpleQueue[int | None] = field(default_factory=SimpleQueue)  # None: there is nothing more
    done: SimpleQueue[BaseException | None] = field(default_factory=SimpleQueue)  # a job, or the end of an instance
    stop: Event = field(default_factory=Event)


class Instance:
    """A core of one row. Made and used on its own thread.

    Args:
        config, resolved, folder: of `survey` and `settle`, once for all instances.
        threads: of OpenMP, on a CPU. asleep: `ModelRunner.wait_asleep`, where instances are more than cores.
        model: the first instance's; None: this is it.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedConfig,
        folder: Path,
        threads: int,
        asleep: bool,
        model: CausalLM | None,
    ) -> None:
        if resolved.engine.device == "cpu":
            torch.set_num_threads(threads)  # of this thread; also what threads start with that come later
        seconds = WARM_UP_SECONDS if model is None else LATER_WARM_UP_SECONDS
        runner = make_runner(resolved, folder, StartupTimes(), model, seconds)
        if asleep:
            runner.wait_asleep()
        self.model = runner.model
        self.core = EngineCore(config, InlineExecutor(runner), resolved)

    def serve(self, session: Session) -> list[StepStats]:
        """One request after the other, until there are no more."""
        steps: list[StepStats] = []
        try:
            self.reset()
            while (index := session.waiting.get()) is not None:
                self.serve_one(index, session, steps)
                session.done.put(None)
        except BaseException as error:
            session.done.put(error)
            raise
        return steps

    def reset(self) -> None:
        """Forget cached prefixes, so that a run finds nothing of the one before."""
        self.core.scheduler.kv.reset_cache()

    def serve_one(self, index: int, session: Session, steps: list[StepStats]) -> None:
        """A job to its end, or until the session stops."""
        core, record, job = self.core, session.records[index], session.jobs[index]
        request = as_request(index, job)
        request.arrival_time = session.origin + job.arrival
        core.add(request)
        while core.has_unfinished():
            if session.stop.is_set():
                abandon(core, [request])
                return
            output = core.step()
            if output.stats is not None:
                steps.append(output.stats)
                if output.requests:
                    record.times.append(output.stats.end - session.origin)
        take_finished(request, record)

    def check(self, job: Job) -> None:
        """ValueError for a job that is too long."""
        self.core.check(as_request(0, job))

    def logit_gaps(self, partings: Sequence[Parting]) -> list[float | None]:
        """`engines.logit_gaps`."""
        return logit_gaps(self.core, partings)


class Served(Protocol):
    """What serves one request at a time: an instance, or a process with one."""

    def serve(self, session: Session) -> list[StepStats]:
        """Take what waits until there is no more; -> the steps."""
        ...

    def check(self, job: Job) -> None:
        """ValueError for a job that is too long."""
        ...

    def logit_gaps(self, partings: Sequence[Parting]) -> list[float | None]:
        """`engines.logit_gaps`."""
        ...


class InstancesSystem:
    """Several of whatever serves, each used on a thread of its own; a free one takes the oldest waiting request."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self._workers = [ThreadPoolExecutor(1, f"flover-instance-{i}") for i in range(count)]
        self.instances: list[Served] = []

    def warm_up(self, job: Job) -> None:
        """Every instance serves a short request until its graphs are captured, one instance after the other."""
        short = job._replace(arrival=0.0, num_output=min(job.num_output, 3))
        for worker, instance in zip(self._workers, self.instances):
            for _ in range(CAPTURED_AFTER):
                session = Session([short], new_records([short]), time.monotonic())
                session.waiting.put(0)
                session.waiting.put(None)
                worker.submit(instance.serve, session).result()

    def logit_gaps(self, partings: Sequence[Parting]) -> list[float | None]:
        """`engines.logit_gaps`, of the first instance."""
        return self._workers[0].submit(self.instances[0].logit_gaps, partings).result()

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `records.System.run`.

        Raises:
            ValueError: a job that is too long for the context; nothing has run then.
        """
        for job in jobs:
            self.instances[0].check(job)
        records = new_records(jobs)
        if watch is not None:
            watch(records)
        session = Session(jobs, records, time.monotonic())
        served = [w.submit(one.serve, session) for w, one in zip(self._workers, self.instances)]
        try:
            self._feed(session)
        finally:
            session.stop.set()
            for _ in served:
                session.waiting.put(None)
            steps = _collect(served)
        shift(steps, session.origin)
        return Run(self.name, session.records, steps)

    def _feed(self, session: Session) -> None:
        """Jobs into the queue as they arrive, until all are done."""
        jobs, given, finished = session.jobs, 0, 0
        while finished < len(jobs):
            now = time.monotonic() - session.origin
            while given < len(jobs) and jobs[given].arrival <= now:
                session.waiting.put(given)
                given += 1
            left = jobs[given].arrival - now if given < len(jobs) else None
            if left is not None and left < 2e-3:
                wait_until(session.origin + jobs[given].arrival)
                continue
            try:
                error = session.done.get(timeout=None if left is None else left - 1e-3)
            except Empty:
                continue
            if error is not None:
                raise error
            finished += 1

    def close(self) -> None:
        for worker in self._workers:
            worker.shutdown()
        self.instances.clear()
        self._workers.clear()
        release()


class ConcurrentSystem(InstancesSystem):
    """See the module.

    Args:
        config: the engine's; one row for each instance, whose KV cache holds one request of max_model_len.
        count: instances; None: 32, or as many as max_num_seqs, the memory or, on a CPU, its cores allow.

    Raises:
        ValueError: more than fit, with what they need and how many would; or as `EngineCore`.
    """

    def __init__(self, name: str, config: EngineConfig, count: int | None = None) -> None:
        cores, wanted = os.cpu_count() or 1, config.max_num_seqs or DEFAULT_INSTANCES
        config, resolved, folder = one_row(config)
        most = most_instances(resolved)
        on_cpu = resolved.engine.device == "cpu"
        count = count or min(DEFAULT_INSTANCES, wanted, most, cores if on_cpu else most)
        if count > most:
            memory = resolved.memory
            needed = memory.weights + count * (memory.step + memory.kv)
            raise ValueError(
                f"{count} instances need {human(needed)} (KV cache {human(memory.kv)} and largest step "
                f"{human(memory.step)} each), {human(memory.free)} is free: concurrent:{most} would fit"
            )
        if on_cpu:  # the instance computes in `submit`: nothing would overlap
            config = replace(config, overlap_depth=0)
        threads = config.num_threads or torch.get_num_threads()
        super().__init__(name, count)
        model: CausalLM | None = None
        try:
            for worker in self._workers:
                share, alone = max(1, threads // count), replace(config, num_threads=None)
                instance = worker.submit(Instance, alone, resolved, folder, share, count > cores, model).result()
                self.instances.append(instance)
                model = instance.model
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(threads)


def one_row(config: EngineConfig) -> tuple[EngineConfig, ResolvedConfig, Path]:
    """Settings of an instance, as given and as they are here, and the checkpoint's folder."""
    config = replace(config, policy="serial", max_num_seqs=1, num_kv_blocks=None, kv_cache_memory_bytes=None)
    found = survey(config)
    return config, settle(config, *found), found[0]


def most_instances(resolved: ResolvedConfig) -> int:
    """How many caches and steps of one row fit beside the weights."""
    memory, share = resolved.memory, memory_share(resolved.engine, resolved.engine.device)
    return int((memory.free * share - memory.weights) // (memory.step + memory.kv))


def _collect(served: Sequence[Future[list[StepStats]]]) -> list[StepStats]:
    """Steps of all instances in order of their start; those of an instance that failed are lost."""
    steps = [stats for one in served if one.exception() is None for stats in one.result()]
    steps.sort(key=lambda stats: stats.start)
    for i, stats in enumerate(steps):
        stats.step = i
    return steps
