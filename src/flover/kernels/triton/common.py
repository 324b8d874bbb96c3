"""What every Triton kernel shares: whether it is interpreted, programmatic dependent launch (PDL), arrival counters.

With PDL a kernel may start while the one before it on the stream still runs; `grid_wait` blocks until that one has
ended and its writes are visible, so every kernel calls it before it reads what another wrote, and every kernel of a
chain calls it, so that order is transitive. `grid_launch` lets the next one start; a kernel that never calls it does so
by ending. Both are compiled away where PDL is off (the interpreter, GPUs before Hopper).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def grid_wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def grid_launch(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Into L2; on Hopper."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every launch: the constexpr `PDL`, and the launch attribute that goes with it."""
    pdl = not INTERPRET and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


ARRIVALS = 1 << 16
_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(device: torch.device, count: int = 1) -> Tensor:
    """At least `count` int32 counters, zero between kernels: from one a program learns if it is the last of its unit.

    More than ARRIVALS (decode of thousands of rows) are a launch's own, cleared for it: it takes long anyway.
    Kernels of one stream take turns (under PDL too: none counts before its `grid_wait`), those of two do not, so each
    stream has its own. A CUDA graph keeps the counters of the stream that it was captured on. The runner captures on
    the stream that it replays and launches on, after a first launch there, so nothing else counts in them meanwhile. A
    capture on a stream that never launched gets counters that the graph itself owns and clears: a buffer made here
    during a capture would be cleared by that graph's replays only, and is therefore not kept.
    """
    if count > ARRIVALS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _arrivals:
        counters = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        if stream and torch.cuda.is_current_stream_capturing():
            return counters
        _arrivals[device, stream] = counters
    return _arrivals[device, stream]


def assert_heads_side_by_side(*parts: Tensor) -> None:
    """Of each `[num_tokens, heads, head_dim]`, which kernels address with a stride between tokens alone."""
    for x in parts:
        assert x.stride(2) == 1
        assert x.shape[1] == 1 or x.stride(1) == x.shape[2], f"strides {x.stride()} of shape {tuple(x.shape)}"
