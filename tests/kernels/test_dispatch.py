"""Which backend computes, where no GPU is needed to decide it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from flover import profile
from flover.kernels import dispatch
from flover.kernels.dispatch import backend_for

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    backend_for.cache_clear()
    yield
    backend_for.cache_clear()


def test_a_gpu_gets_triton_and_all_else_the_twins() -> None:
    assert backend_for(GPU, torch.float16, 64) == "triton"
    assert backend_for(GPU, torch.float64, 64) == "torch"
    assert backend_for(torch.device("cpu"), torch.float32, 64) == "torch"


def test_a_head_that_no_kernel_covers_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert [backend_for(GPU, torch.float16, 320) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == [
        "head_dim 320 is over 256: PyTorch's own attention is used, slowly"
    ]


def test_without_triton(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert [backend_for(GPU, torch.float16, 64) for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "triton is not installed" in caplog.text
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert profile.environment("cuda")["triton"] is None
