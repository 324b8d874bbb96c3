"""What every Triton kernel shares: whether it is interpreted, and programmatic dependent launch (PDL).

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

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def grid_wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def grid_launch(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every launch: the constexpr `PDL`, and the launch attribute that goes with it."""
    pdl = not INTERPRET and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}
