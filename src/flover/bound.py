"""Bounds: what a step must read and compute, and the time that takes at this machine's measured limits."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flover.anatomy import Work
from flover.engine.engine import EngineCore, free_memory
from flover.engine.runner import ModelRunner
from flover.layers.embedding import Embedding, LMHead
from flover.layers.linear import Linear
from flover.layers.rotary import Rotary
from flover.model_config import ModelConfig

CPU_SUM_BYTES, GPU_SUM_BYTES = 1 << 30, 8 << 30
GPU_WIDTH = 8192  # of the square product
HEAT_SECONDS = 1.5  # until the clock is what the power limit leaves of it


class Limits(NamedTuple):
    """Bytes/s of a sum and FLOP/s of a matrix product, measured here.

    sustained: FLOP/s once the power limit holds the clock, see `heated`.
    """

    bandwidth: float
    flops: float
    sustained: float = math.nan


def measured_limits(device: str, dtype: torch.dtype) -> Limits:
    """Limits of a device: a sum over 8 GiB (at most half of what is free; on a CPU 1 GiB, an eighth), and a square
    product in `dtype` (int8 and float8_e4m3fn too), 8192 wide (CPU: 1024). Call it before an engine takes the memory.
    """
    if device == "cpu":  # on a thread of its own, whose OpenMP threads end with it: they would slow the engine's
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(_measure, device, dtype, min(CPU_SUM_BYTES, free_memory() // 8), 1024).result()
    return _measure(device, dtype, min(GPU_SUM_BYTES, torch.cuda.mem_get_info()[0] // 2), GPU_WIDTH)


def _measure(device: str, dtype: torch.dtype, num_bytes: int, width: int) -> Limits:
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    bandwidth = data.numel() * 4 / median_seconds(data.sum, device)
    del data
    flops = 2 * width**3 / median_seconds(_product(device, dtype, width), device)
    if device == "cuda":
        torch.cuda.empty_cache()
    return Limits(bandwidth, flops)


def heated(limits: Limits, device: str, dtype: torch.dtype) -> Limits:
    """With what products sustain: a GPU has its highest clock for some hundred milliseconds, a long load less."""
    if device != "cuda":
        return limits._replace(sustained=limits.flops)
    product, flops = _product(device, dtype, GPU_WIDTH), limits.flops
    until = time.monotonic() + HEAT_SECONDS
    while time.monotonic() < until:
        flops = 2 * GPU_WIDTH**3 / median_seconds(product, device)
    torch.cuda.empty_cache()
    return limits._replace(sustained=flops)


def _product(device: str, dtype: torch.dtype, width: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in "ab")
    if dtype == torch.int8:
        return lambda: torch._int_mm(a, b.t())
    if dtype == torch.float8_e4m3fn:
        if device == "cpu":  # as its products are computed: those of fp8 take half a minute where oneDNN has none
            wide, other = a.float(), b.float()
            return lambda: wide @ other
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
    return lambda: a @ b


def median_seconds(function: Callable[[], Any], device: str) -> float:
    """Of nine calls, after one; on a GPU by events."""
    function()
    times: list[float] = []
    for _ in range(9):
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
        model: nn.Module = runner.model
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
            size = sum(t.numel() * t.element_size() for t in tensors)
            count = sum(t.numel() for t in tensors)
            self.weight_bytes += size
            self.parameters += count
            if isinstance(module, Linear):
                self.products.append((size, count))
            if isinstance(module, LMHead):
                self.head = count
        layers = zip(runner.storage.k, runner.storage.v)
        self.kv_bytes = [sum(t[0].numel() * t.element_size() for t in pair) for pair in layers]  # a token, by layer
        self.windows = [self.config.sliding_window(i) for i in range(self.config.num_layers)]

    def sustained(self) -> Bound:
        """The same where products take what they take once the GPU is at its power limit."""
        other = copy.copy(self)
        other.limits = self.limits._replace(flops=self.limits.sustained)
        return other

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
