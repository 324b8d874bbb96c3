"""Profiling an engine: where steps spend their time, beside the bound.

`profile_decode` runs a batch until every row decodes, times steps as they are, then records some more with
`torch.profiler`. It stands on `EngineCore` and reaches into its executor for one runner on one device.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import flover
from flover.anatomy import STAGING, Anatomy, Event, Work, anatomy, exclusive
from flover.bound import Bound, runner_of
from flover.config import SchedulerConfig
from flover.engine.engine import EngineCore
from flover.engine.runner import ModelRunner
from flover.request import FinishReason, Request, RowSampling

STEP = "flover::step"  # around a step on a CPU
WARM_STEPS = 6  # compile kernels, capture graphs
NOT_TOGETHER = "these requests never decode in one batch: fewer rows, a shorter context or policy='fused' would"


@dataclass(frozen=True, slots=True)
class Profile:
    """Steady decode steps of `batch` rows, or (step_ms: of the whole) one prompt's prefill.

    Args:
        context: tokens of a row, mean over the timed steps. step_ms: wall time, without the profiler.
        host_us: a step's schedule, submit and update, and what it waits for the device. share_of_bound: bound / step.
    """

    phase: str
    batch: int
    context: float
    step_ms: float
    bound_ms: float
    share_of_bound: float
    host_us: dict[str, float]
    anatomy: Anatomy

    def to_json(self) -> dict[str, Any]:
        return rounded(asdict(self))  # type: ignore[no-any-return]


def rounded(value: Any) -> Any:
    """Floats to four decimals, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def profile_decode(core: EngineCore, bound: Bound, batch: int, context: int, steps: int) -> Profile:
    """Profile `steps` decode steps of `batch` rows with prompts of `context` tokens.

    Raises:
        ValueError: so many rows of that length never decode together here.
    """
    with decoding(core, batch, context, decode_steps(steps)) as requests:
        _steady(core, batch, WARM_STEPS)
        before = sum(len(r.token_ids) for r in requests)
        with HostClock(core) as clock:
            seconds = timed_steps(core, batch, steps) / steps
        length = (before + sum(len(r.token_ids) for r in requests)) / 2 / batch
        events, starts = _record(core, lambda: _steady(core, batch, steps))
    work = Work(batch * bound.kv(length), batch * bound.attention_flops(length))
    limit = bound.decode(batch, length)
    return Profile(
        "decode",
        batch,
        length,
        seconds * 1e3,
        limit * 1e3,
        limit / seconds,
        clock.per_step(steps, seconds),
        anatomy(events, starts, steps, bound.work(batch), work),
    )


def decode_steps(steps: int) -> int:
    """All those that `profile_decode` makes to profile so many."""
    return WARM_STEPS + 2 * steps + 4


def profile_prefill(core: EngineCore, bound: Bound, length: int) -> Profile:
    """Profile the prefill of one prompt of `length` tokens; the time is the best of three."""
    rng = random.Random()  # never the same prompt: its prefix would be cached

    def run() -> None:
        core.add(random_request(core, rng, "prefill", length, 1))
        while core.has_unfinished():
            core.step()

    run()
    best, host = float("inf"), {}
    for _ in range(3):
        with HostClock(core) as clock:
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
        if seconds < best:
            best, host = seconds, clock.per_step(1, seconds)
    events, _ = _record(core, run)
    limit = bound.prefill(1, length)
    pairs = Work(bound.kv(length), bound.attention_flops(length * length / 2))
    work = [*bound.work(length)[:-1], *bound.work(1)[-1:]]  # the head sees the last token only
    found = anatomy(events, [min(e.start for e in events)], 1, work, pairs)
    return Profile("prefill", 1, length, best * 1e3, limit * 1e3, limit / best, host, found)


def random_request(core: EngineCore, rng: random.Random, name: str, length: int, outputs: int) -> Request:
    """Greedy, ends by its length alone."""
    vocab = core.resolved.model.vocab_size
    ids = [rng.randrange(vocab) for _ in range(length)]
    return Request(name, ids, RowSampling(seed=0, temperature=0.0), outputs)


def num_outputs(config: SchedulerConfig, batch: int, context: int, steps: int) -> int:
    """Tokens of each row for `steps` steps together: the first waits while the others are prefilled.

    Raises:
        ValueError: such a batch, or rows so long, are over a limit.
    """
    if batch > config.max_num_seqs:
        raise ValueError(f"a batch of {batch} needs max_num_seqs={batch}, it is {config.max_num_seqs}")
    steps += 2 * -(-batch * context // max(config.max_num_batched_tokens - batch, 16)) + 2
    if context + steps > config.max_model_len:
        raise ValueError(f"a context of {context} and {steps} steps do not fit max_model_len={config.max_model_len}")
    return steps


@contextmanager
def decoding(core: EngineCore, batch: int, context: int, steps: int) -> Iterator[list[Request]]:
    """A batch whose every row decodes, for at least `steps` more steps; withdrawn at the end.

    Raises:
        ValueError: it never does.
    """
    outputs = num_outputs(core.resolved.scheduler, batch, context, steps)
    rng = random.Random()
    requests = [random_request(core, rng, f"profile-{i}", context, outputs) for i in range(batch)]
    try:
        for request in requests:
            core.add(request)
        while not all(r.num_output_tokens for r in requests):
            if any(r.finished for r in requests):
                raise ValueError(NOT_TOGETHER)
            core.step()
        yield requests
    finally:
        for request in requests:
            core.finish(request.request_id, FinishReason.ABORT)
        while core.has_unfinished():
            core.step()


def timed_steps(core: EngineCore, batch: int, steps: int) -> float:
    """Seconds of `steps` steady steps, from an idle device to an idle device."""
    _wait(core)
    started = time.perf_counter()
    _steady(core, batch, steps)
    _wait(core)
    return time.perf_counter() - started


def _wait(core: EngineCore) -> None:
    """Until the device has nothing left to do; the results stay to be read."""
    for _, future in core._in_flight:
        future.exception()
    if core.resolved.engine.device == "cuda":
        torch.cuda.synchronize()


def _steady(core: EngineCore, batch: int, steps: int) -> None:
    for _ in range(steps):
        stats = core.step().stats
        if stats is None or (stats.num_decode_tokens, stats.num_prefill_tokens) != (batch, 0):
            raise ValueError(NOT_TOGETHER)


class HostClock:
    """Seconds that an engine's host spends in schedule, submit and update, while this is entered."""

    def __init__(self, core: EngineCore) -> None:
        self._methods: list[tuple[Any, str]] = [
            (core.scheduler, "schedule"),
            (core._executor, "submit"),
            (core.scheduler, "update"),
        ]
        self.seconds = {name: 0.0 for _, name in self._methods}

    def per_step(self, steps: int, step_seconds: float) -> dict[str, float]:
        """Microseconds a step of each, their sum, and the rest: waiting."""
        parts = {name: total / steps * 1e6 for name, total in self.seconds.items()}
        busy = sum(parts.values())
        return {**parts, "host": busy, "wait": step_seconds * 1e6 - busy}

    def __enter__(self) -> HostClock:
        for owner, name in self._methods:
            setattr(owner, name, self._timed(name, getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name in self._methods:
            delattr(owner, name)  # the class's own again

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


# ---- torch.profiler --------------------------------------------------------------------------------------------------


def _record(core: EngineCore, run: Callable[[], None]) -> tuple[list[Event], list[float]]:
    """Events of the device while `run` runs, and when each step's first began."""
    activity = torch.profiler.ProfilerActivity
    _wait(core)
    if core.resolved.engine.device == "cuda":
        with torch.profiler.profile(activities=[activity.CUDA]) as profile:
            run()
            _wait(core)
        events = [_event(e) for e in profile.events() or () if e.device_type.name == "CUDA"]
        return events, sorted(e.start for e in events if e.name.startswith(STAGING))
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # the executor's is not ours
    with (
        _marked(runner_of(core)),
        torch.profiler.profile(activities=[activity.CPU], experimental_config=everywhere) as profile,
    ):
        run()
        _wait(core)
    recorded = profile.events() or ()
    threads = {e.thread for e in recorded if e.name == STEP}
    events = [_event(e) for e in recorded if e.thread in threads]
    starts = sorted(e.start for e in events if e.name == STEP)
    return [e for e in exclusive(events) if e.name != STEP], starts


def _event(event: Any) -> Event:
    return Event(event.name, event.time_range.start, event.time_range.end)


@contextmanager
def _marked(runner: ModelRunner) -> Iterator[None]:
    """Every step is an interval in the profile."""
    execute = runner.execute

    def marked(plan: Any) -> Any:
        with torch.profiler.record_function(STEP):
            return execute(plan)

    runner.execute = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del runner.execute


def _cpu() -> str:
    """The model where the system tells it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """What a result was measured with."""
    if device == "cuda":
        return {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": import_module("triton").__version__ if find_spec("triton") else None,
            "flover": flover.__version__,
        }
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flover": flover.__version__,
    }
