"""`Layer`: what every layer is told when its model is built."""

from __future__ import annotations

from typing import Any

from torch import nn

from flover.kernels.dispatch import load_backend


class Layer(nn.Module):
    """ops: the backend whose functions compute it. batch_invariant: a token's bits do not depend on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Any = load_backend("torch")
        self.batch_invariant = False
