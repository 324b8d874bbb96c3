from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import ThreadRanks

for folder in ("distributed", "engine", "models"):  # ranks, harness, parity
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

torch.set_num_threads(1)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadRanks]:
    threads = ThreadRanks()
    monkeypatch.setattr("flover.engine.join.start_ranks", threads.start)
    yield threads
    threads.join()
