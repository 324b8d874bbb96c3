"""Profiling an engine: the limits of the machine, the bound they set, and where steps spend their time.

`profile_decode` runs a batch until every row decodes, times steps as they are, then records some more with
`torch.profiler`. It stands on `EngineCore` and reaches into its executor for one runner on one device.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flover
from flover.anatomy import STAGING, Anatomy, Event, Work, anatomy, exclusive
from flover.config import ModelConfig
from flover.engine.engine import EngineCore, free_memory
from flover.engine.runner import ModelRunner
from flover.layers.embedding import Embedding, LMHead
from flover.layers.linear import Linear
from flover.layers.rotary import Rotary
from flover.request import FinishReason, Request, RowSampling

STEP = "flover::step"  # around a step on a CPU
WARM_STEPS = 6  # compile kernels, capture graphs
CPU_SUM_BYTES, GPU_SUM_BYTES = 1 << 30, 8 << 30
NOT_TOGETHER = "these requests never decode in one batch: fewer rows, a shorter context or policy='fused' would"


# ---- limits and bounds -----------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Bytes/s of a sum, FLOP/s of a matrix product, measured here."""

    bandwidth: float
    flops: float


def measured_limits(device: str, dtype: torch.dtype) -> Limits:
    """Limits of a device: a sum over 8 GiB (at most half of what is free; on a CPU 1 GiB, an eighth), and a square
    product in `dtype`, 8192 wide (CPU: 1024). To be called before an engine takes the memory.
    """
    if device == "cpu":  # on a thread of its own, whose OpenMP threads end with it: they would slow the engine's
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(_measure, device, dtype, min(CPU_SUM_BYTES, free_memory() // 8), 1024).result()
    return _measure(device, dtype, min(GPU_SUM_BYTES, torch.cuda.mem_get_info()[0] // 2), 8192)


def _measure(device: str, dtype: torch.dtype, num_bytes: int, width: int) -> Limits:
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    bandwidth = data.numel() * 4 / _seconds(data.sum, device)
    del data
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in "ab")
    flops = 2 * width**3 / _seconds(lambda: a @ b, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    return Limits(bandwidth, flops)


def _seconds(function: Callable[[], Any], device: str, repeats: int = 9) -> float:
    """Median of some calls, after one."""
    function()
    times: list[float] = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")  # type: ignore[no-untyped-call]
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


class Bound:
    """What steps cannot do without, and the seconds it takes at the measured limits.

    Weights are the tensors that the model holds, in the bytes that they have: the token embedding and position tables,
    of which a step reads a few rows, are not counted, the output head is.
    """

    def __init__(self, core: EngineCore, limits: Limits) -> None:
        runner = runner_of(core)
        model: nn.Module = runner.model  # type: ignore[assignment]
        self.limits = limits
        self.config: ModelConfig = core.resolved.model
        self.max_rows = core.resolved.scheduler.max_num_seqs
        self.weight_bytes, self.parameters, self.head = 0, 0, 0
        self.products: list[tuple[int, int]] = []  # bytes and parameters of each linear layer, in the model's order
        seen: set[int] = set()
        for module in model.modules():
            if isinstance(module, Embedding | Rotary):
                continue
            tensors = [t for t in _tensors(module) if _address(t) not in seen]
            seen.update(_address(t) for t in tensors)
            size, count = (sum(t.numel() * n(t) for t in tensors) for n in (Tensor.element_size, lambda _: 1))
            self.weight_bytes += size
            self.parameters += count
            if isinstance(module, Linear):
                self.products.append((size, count))
            if isinstance(module, LMHead):
                self.head = count
        layers = zip(runner.storage.k, runner.storage.v)
        self.kv_bytes = [sum(t[0].numel() * t.element_size() for t in pair) for pair in layers]  # a token, by layer
        self.windows = [self.config.sliding_window(i) for i in range(self.config.num_layers)]

    def kv(self, context: float) -> float:
        """Bytes of one row's live keys and values."""
        return sum(n * min(context, w or context) for n, w in zip(self.kv_bytes, self.windows))

    def decode(self, batch: int, context: float) -> float:
        """Seconds of a decode step: max(weight bytes / BW, 2 P B / F) + live KV bytes / BW."""
        return self._weights(batch) + batch * self.kv(context) / self.limits.bandwidth

    def prefill(self, count: int, length: int) -> float:
        """Seconds of `count` prompts of `length` tokens: FLOPs of products and causal attention / F."""
        products = 2 * (self.parameters - self.head) * count * length + 2 * self.head * count
        return (products + count * self.attention_flops(length * length / 2)) / self.limits.flops

    def trace(self, lengths: Sequence[tuple[int, int]]) -> float:
        """Seconds of requests (prompt, output tokens), all there at once: every prefill, full steps, all KV reads."""
        outputs = sum(m for _, m in lengths)
        rows = min(self.max_rows, len(lengths))
        reads = sum(m * self.kv(n + m / 2) for n, m in lengths) / self.limits.bandwidth
        return sum(self.prefill(1, n) for n, _ in lengths) + outputs / rows * self._weights(rows) + reads

    def attention_flops(self, pairs: float) -> float:
        """Of that many (query, key) pairs in every layer."""
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim * pairs

    def work(self, tokens: int) -> list[Work]:
        """The matrix products of a step of that many tokens, each with its weights read once."""
        return [Work(size, 2 * count * tokens) for size, count in self.products]

    def _weights(self, batch: int) -> float:
        return max(self.weight_bytes / self.limits.bandwidth, 2 * self.parameters * batch / self.limits.flops)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and plain attributes (packed weights) of a module itself."""
    plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False), *plain]


def _address(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def runner_of(core: EngineCore) -> ModelRunner:
    """The engine's runner, where it has one in this process."""
    runner = getattr(core._executor, "_runner", None)
    if not isinstance(runner, ModelRunner):
        raise ValueError("only an engine with one runner in this process can be profiled")
    return runner


# ---- profiles --------------------------------------------------------------------------------------------------------


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
    with decoding(core, batch, context, WARM_STEPS + 2 * steps + 4) as requests:
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


def profile_prefill(core: EngineCore, bound: Bound, length: int, repeats: int = 3) -> Profile:
    """Profile the prefill of one prompt of `length` tokens; the time is the best of some."""

    def run() -> None:
        core.add(random_request(core, "prefill", length, 1))
        while core.has_unfinished():
            core.step()

    run()
    best, host = float("inf"), {}
    for _ in range(repeats):
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
    anatomy_ = anatomy(events, [e.start for e in events[:1]], 1, work, pairs)
    return Profile("prefill", 1, length, best * 1e3, limit * 1e3, limit / best, host, anatomy_)


def random_request(core: EngineCore, name: str, length: int, outputs: int) -> Request:
    """Greedy, ends by its length alone."""
    vocab = core.resolved.model.vocab_size
    ids = [random.randrange(vocab) for _ in range(length)]
    return Request(name, ids, RowSampling(seed=0, temperature=0.0), outputs)


@contextmanager
def decoding(core: EngineCore, batch: int, context: int, steps: int) -> Iterator[list[Request]]:
    """A batch whose every row decodes, for at least `steps` more steps; withdrawn at the end.

    Raises:
        ValueError: it never does.
    """
    config = core.resolved.scheduler
    if batch > config.max_num_seqs:
        raise ValueError(f"a batch of {batch} needs max_num_seqs={batch}, it is {config.max_num_seqs}")
    prefill = 2 * -(-batch * context // max(config.max_num_batched_tokens - batch, 16)) + 2  # steps: the first wait
    if context + prefill + steps > config.max_model_len:
        raise ValueError(
            f"a context of {context} and {prefill + steps} steps do not fit max_model_len={config.max_model_len}"
        )
    requests = [random_request(core, f"profile-{i}", context, prefill + steps) for i in range(batch)]
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
    events = [_event(e) for e in profile.events() or ()]
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


def environment(device: str) -> dict[str, Any]:
    """What a result was measured with."""
    if device == "cuda":
        import triton

        return {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "flover": flover.__version__,
        }
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flover": flover.__version__,
    }
