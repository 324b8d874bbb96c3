"""The clock around reordering: what planning moves, copying keys and values, and moving rows take in a run.

Planning is host time. A copy and a move of rows have both: the host's to launch them and, on a GPU, the device's
between two events. The host's mostly passes beside earlier steps of the device, so the sum is more than a run loses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from flover.bound import runner_of
from flover.engine.engine import EngineCore


class ReorderClock:
    """While entered, measures an engine's `kv.reorder`, `copy_blocks` and `sampler.relocate`."""

    def __init__(self, core: EngineCore) -> None:
        runner = runner_of(core)
        self._on_gpu = runner.device.type == "cuda"
        self._storage, self._ops = runner.storage, runner.storage._ops
        self._kv, self._sampler = core.scheduler.kv, runner.sampler
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> ReorderClock:
        self._storage._ops = _Timed(self._ops, self._around(self._ops.copy_blocks, self._on_gpu))
        for owner, name, on_device in ((self._kv, "reorder", False), (self._sampler, "relocate", self._on_gpu)):
            setattr(owner, name, self._around(getattr(owner, name), on_device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._storage._ops = self._ops
        for owner, name in ((self._kv, "reorder"), (self._sampler, "relocate")):
            delattr(owner, name)

    def _around(self, function: Callable[..., Any], on_device: bool) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            if on_device:
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                events[0].record()
            try:
                return function(*args, **options)
            finally:
                if on_device:
                    events[1].record()
                    self._events.append(events)
                self._host += time.perf_counter() - started

        return timed

    @property
    def host_seconds(self) -> float:
        return self._host

    @property
    def device_seconds(self) -> float:
        """Once the run is over."""
        if self._events:
            torch.cuda.synchronize()
        return sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1e3


class _Timed:
    """A backend whose `copy_blocks` is timed."""

    def __init__(self, ops: Any, copy_blocks: Callable[..., Any]) -> None:
        self._ops, self.copy_blocks = ops, copy_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)
