"""`EngineCore`: the loop. schedule -> submit -> update, with `overlap_depth` plans made ahead of the result in flight.

A masked plan (grammars) is launched like any other, and sampled once the result before it is known.
Tokens only; text is the business of `llm_engine`. Invariant: at depth 1, in every steady step, `submit(n + 1)` precedes
the first read of result n.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch

from flover.config import EngineConfig, Hardware, KVConfig, ResolvedConfig
from flover.engine.batch import BatchPlan, RowMasks, StepResult
from flover.engine.cuda_graph import WARM_UP_SECONDS
from flover.engine.executor import InlineExecutor, ThreadExecutor
from flover.engine.grammar import Grammars, Vocabulary
from flover.engine.group import GroupExecutor
from flover.engine.join import form_group, use_threads
from flover.engine.launch import check_size, ranks_here
from flover.engine.links import GroupDeadError
from flover.engine.runner import ModelRunner
from flover.engine.scheduler import Scheduler
from flover.engine.step import Step, StepOutput
from flover.kv.paged import PagedLayout
from flover.kv.protocol import KVLayout
from flover.kv.slab import SlabLayout, SlabMode
from flover.model_config import ModelConfig
from flover.models.base import CausalLM
from flover.models.loader import resolve_model, weight_bytes
from flover.models.registry import backend_of, model_class
from flover.parallel import ALONE, Group
from flover.request import FinishReason, Request
from flover.resolve import effective_dtype, of_a_stage, resolve
from flover.sharding import check_ranks
from flover.startup import StartupTimes, process_age

IMPORTS = process_age()  # seconds until this line, above which all of flover, torch and Python itself were imported
logger = logging.getLogger("flover")


class Executor(Protocol):
    def submit(self, plan: BatchPlan) -> Future[StepResult]: ...
    def sample(self, masks: RowMasks) -> Future[StepResult]: ...
    def warm_up(self, seconds: float) -> None: ...
    def reset(self) -> None: ...
    def shutdown(self) -> None: ...


def detect_hardware(device: str) -> Hardware:
    """The device asked for ("auto": CUDA if there is one) and the bytes free on it.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but torch sees no CUDA device; device='cpu' works, `flover doctor` says more")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return Hardware("cuda", torch.cuda.mem_get_info()[0])
    return Hardware("cpu", free_memory())


def _share(hardware: Hardware, ranks: int) -> Hardware:
    """A rank's part of this machine.

    Raises:
        ValueError: more ranks than GPUs.
    """
    here = ranks_here(ranks)
    if hardware.device == "cpu":
        return hardware._replace(free_bytes=hardware.free_bytes // here)
    if here > (have := torch.cuda.device_count()):
        raise ValueError(f"{ranks} ranks need {here} GPUs on this machine, it has {have}")
    return hardware


def free_memory() -> int:
    """Bytes of memory available to a new process (Linux: MemAvailable; elsewhere: all physical memory)."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_layout(kv: KVConfig) -> KVLayout:
    """The host allocator of a KV layout."""
    if kv.layout == "slab":
        return SlabLayout(kv.num_blocks, kv.block_size, mode=cast(SlabMode, kv.reorder))
    return PagedLayout(kv.num_blocks, kv.block_size, enable_prefix_caching=kv.prefix_caching)


def make_runner(
    config: ResolvedConfig,
    folder: Path,
    times: StartupTimes,
    model: CausalLM | None = None,
    warm_up_seconds: float = WARM_UP_SECONDS,
    group: Group = ALONE,
) -> ModelRunner:
    """The runner that fits backend and device. model: of another runner, whose weights this one shares."""
    if backend_of(config) != "triton":
        return ModelRunner(config, folder, times=times, model=model, group=group)
    from flover.engine.gpu_runner import GpuRunner  # triton is not everywhere

    runner = GpuRunner(config, folder, times, model, group)
    with times.phase("graphs"):
        runner.warm_up(warm_up_seconds)
    return runner


def make_executor(config: ResolvedConfig, folder: Path, times: StartupTimes) -> Executor:
    """A runner, where it should run; with others like it, if the model has several ranks."""

    def local(group: Group) -> InlineExecutor | ThreadExecutor:
        make = partial(make_runner, config, folder, times, group=group)
        return InlineExecutor(make()) if backend_of(config) == "triton" else ThreadExecutor(make)

    check_size(config.engine.num_ranks)
    return local(ALONE) if config.engine.num_ranks == 1 else form_group(config, folder, local)


def survey(config: EngineConfig, times: StartupTimes | None = None) -> tuple[Path, ModelConfig, Hardware, int]:
    """What `resolve` needs to know, before anything is allocated: checkpoint folder, its config, machine, weight bytes.

    Args:
        times: gets the phases "config" and "device" (on a GPU: CUDA starts).

    Raises:
        ValueError: a model that is not there or not known, a device that is not there.
    """
    times = times or StartupTimes()
    with times.phase("config"):
        folder = resolve_model(config.model)
        model = ModelConfig.from_folder(folder)
        model_class(model.architecture)
        with times.phase("device"):
            hardware = detect_hardware(config.device)
        dtype: torch.dtype = getattr(torch, effective_dtype(config, model, hardware.device))
        if hardware.device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            raise ValueError("this GPU is too old for bfloat16 (compute capability below 8.0); dtype='float16' works")
        kind, group = config.quantization, Group(0, config.tensor_parallel_size)
        if config.num_ranks > 1:
            check_ranks(model, group.size)
            hardware = _share(hardware, config.num_ranks)
        fp8 = "fp8" in (kind[:3], config.kv_cache_dtype)
        if hardware.device == "cuda" and fp8 and torch.cuda.get_device_capability() < (8, 9):
            instead = f"quantization={kind.replace('fp8', 'int8')!r}, kv_cache_dtype='auto'"
            raise ValueError(f"this GPU is too old for fp8 (compute capability below 8.9); {instead} works")
        return folder, model, hardware, weight_bytes(folder, of_a_stage(config, model), dtype, kind, group)


def settle(
    config: EngineConfig,
    folder: Path,
    model: ModelConfig,
    hardware: Hardware,
    weights: int,
    times: StartupTimes | None = None,
) -> ResolvedConfig:
    """`resolve` with what `survey` found; on a GPU also with the memory of the largest step, which is measured."""
    times = times or StartupTimes()
    with times.phase("config"):
        resolved = resolve(config, model, hardware, weights)  # refuses what cannot fit before anything is allocated
    if backend_of(resolved) == "triton":
        with times.phase("imports"):
            from flover.engine.step_memory import measure_step_bytes  # and triton

        with times.phase("largest step"):
            step_bytes = measure_step_bytes(resolved, folder, hardware)
        resolved = resolve(config, model, hardware, weights, step_bytes)
    return resolved


class EngineCore:
    """Requests in, tokens out. Not thread-safe: one caller drives `step`.

    Args:
        config: the user's settings; resolved against the checkpoint and the machine here.
        executor: by default a thread with a `ModelRunner`, or the caller's with a `GpuRunner`.
        resolved: for an executor whose settings are resolved already.

    Raises:
        ValueError: anything wrong with the checkpoint or the settings, in one line.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor | None = None, resolved: ResolvedConfig | None = None
    ) -> None:
        self.startup_times = StartupTimes(IMPORTS)
        if resolved is None:
            self.folder, model, hardware, weights = survey(config, self.startup_times)
            resolved = settle(config, self.folder, model, hardware, weights, self.startup_times)
            logger.info("memory: %s", resolved.memory)
            context, possible = resolved.scheduler.max_model_len, model.max_position_embeddings
            if config.max_model_len is None and context < possible:
                logger.warning("the context is cut to the %d tokens that the KV cache holds, of %d", context, possible)
        else:
            self.folder = resolve_model(config.model)
        use_threads(config, resolved.engine.device)
        self.resolved: ResolvedConfig = resolved
        self.dead: GroupDeadError | None = None  # a rank is lost, and nothing can be served any more
        self.clock = time.monotonic
        self.scheduler = Scheduler(self.resolved.scheduler, self.resolved.kv, make_layout(self.resolved.kv), self.clock)
        self._executor = executor or make_executor(self.resolved, self.folder, self.startup_times)
        model = self.resolved.model
        self._grammars = Grammars(Vocabulary(self.folder, model.vocab_size, model.eos_token_ids))
        self._in_flight: deque[tuple[Step, Future[StepResult]]] = deque()
        self._depth = config.overlap_depth

    def warm_up(self, seconds: float = 60.0) -> None:
        """Compile kernels and capture all likely step shapes now, not only those that a start has time for.

        Only while nothing runs. seconds: begins nothing new after them.
        """
        self._executor.warm_up(seconds)

    def check(self, request: Request) -> None:
        """ValueError if a request could never be served: too long for the context or for the cache."""
        self.scheduler.check(request)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if its id is live or it could never be served, RuntimeError if a rank is lost."""
        if self.dead is not None:
            raise self.dead
        request.arrival_time = request.arrival_time or self.clock()
        self.scheduler.add(request)
        if request.grammar:
            self._grammars.add(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live request (abort, stop string); unknown or finished ids are ignored."""
        self.scheduler.finish(request_id, reason, stop_reason)

    def has_unfinished(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def step(self) -> StepOutput:
        """Keep the pipeline full, then take in the oldest result."""
        while len(self._in_flight) <= self._depth:
            planned = self.scheduler.schedule()
            if planned is None:
                break
            self._in_flight.append((planned, self._executor.submit(planned.plan)))
            if len(self._in_flight) == 1:
                self._mask_oldest()
        if not self._in_flight:
            if self.scheduler.requests and self._grammars.wait():
                return StepOutput(finished=self.scheduler.drain_finished())
            assert self.scheduler.drained, "requests wait, nothing runs and nothing could be scheduled"
            return StepOutput(finished=self.scheduler.drain_finished())
        step, future = self._in_flight.popleft()
        try:
            result = future.result()
        except GroupDeadError as error:
            return self._die(step, error)
        except Exception as error:
            return self._recover(step, error)
        output = self.scheduler.update(step, result)
        if self._in_flight:
            self._mask_oldest()
        return output

    def _mask_oldest(self) -> None:
        """Nothing is in flight before the oldest step any more, so the tokens that its masks depend on are known."""
        step, _ = self._in_flight[0]
        if step.plan.masked:
            masks, failed = self._grammars.masks(step)
            self._in_flight[0] = step, self._executor.sample(masks)
            for request, error in failed:
                self.scheduler.fail(request, error)

    def _recover(self, failed: Step, error: Exception) -> StepOutput:
        """A step failed: its requests end with the error, later plans are void, everyone else is recomputed.

        Out of memory, all are recomputed, in smaller steps.
        """
        while self._in_flight:
            _, future = self._in_flight.popleft()
            future.exception()
        self._executor.reset()
        if isinstance(error, torch.OutOfMemoryError) and self.scheduler.take_smaller_steps(failed):
            return StepOutput(stats=failed.stats)
        logger.error("step %d failed: %s: %s", failed.plan.step, type(error).__name__, error)
        self.scheduler.rewind(failed, f"the step failed on the device: {type(error).__name__}: {error}")
        return StepOutput(finished=self.scheduler.drain_finished(), stats=failed.stats)

    def _die(self, failed: Step, error: GroupDeadError) -> StepOutput:
        """A rank is lost: every request ends with the error."""
        self.dead = error
        self._in_flight.clear()
        logger.error("%s", error)
        self.scheduler.rewind(failed, str(error))
        self.scheduler.fail_all(str(error))
        return StepOutput(finished=self.scheduler.drain_finished(), stats=failed.stats)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call it, from another thread, once a rank of this core's group is lost, also while nothing runs."""
        if isinstance(self._executor, GroupExecutor):
            self._executor.when_lost(call)

    def shutdown(self) -> None:
        """Stop the executor; in-flight work is dropped."""
        self._executor.shutdown()
        self._grammars.shutdown()
