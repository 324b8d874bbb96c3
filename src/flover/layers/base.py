"""`Layer`: what every layer is told when its model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flover.kernels.dispatch import load_backend
from flover.parallel import ALONE, Group
from flover.sharding import Part


class Layer(nn.Module):
    """ops: the backend whose functions compute it. batch_invariant: a token's bits do not depend on its batch.

    group: the ranks that compute it together. A model is built whole, on the meta device; then each layer says by
    `shard` which part of its parameters this rank holds, and computes with those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Any = load_backend("torch")
        self.batch_invariant = False
        self.group: Group = ALONE

    def shard(self, group: Group) -> Mapping[str, Part]:
        """Become a rank's layer; -> the part that it holds of each parameter that is divided."""
        self.group = group
        return {}
