"""Tiny checkpoints, each made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not spin on shared cores

import pytest
import torch
from parity import CASES, Checkpoint, checkpoints


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the products are tiny; handing them to other threads costs more than it gives


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A case's checkpoint by name."""
    return checkpoints(CASES, tmp_path_factory)
