"""Triton kernels against their twins: compiled where there is a GPU, in Triton's interpreter elsewhere (not bf16)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from triton_device import DEVICE, DTYPES


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
