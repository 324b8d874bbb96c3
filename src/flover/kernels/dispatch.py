"""Which backend computes: `torch`, the twins of kernels/reference, or `triton`. Decided once, when a model is built.

Both are modules with the same functions under the same names, so a layer holds one of them and knows no device.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

MAX_HEAD_DIM = 256
logger = logging.getLogger("flover")


@cache
def backend_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`triton` on a CUDA GPU for what its kernels cover, else `torch`; says once where that is slower than need be."""
    if device.type != "cuda" or dtype == torch.float64:
        return "torch"
    if find_spec("triton") is None:
        logger.warning("triton is not installed: the GPU runs PyTorch's own kernels, slowly; `pip install triton`")
        return "torch"
    if head_dim > MAX_HEAD_DIM:
        logger.warning("head_dim %d is over %d: PyTorch's own attention is used, slowly", head_dim, MAX_HEAD_DIM)
        return "torch"
    return "triton"


def load_backend(name: str) -> Any:
    """The module of a backend's functions."""
    return import_module("flover.kernels.reference" if name == "torch" else "flover.kernels.triton")
