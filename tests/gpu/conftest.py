"""These tests need a CUDA GPU; elsewhere they are not collected."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # parity: tiny checkpoints of every family

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
