"""Activation functions, under the names that config.json uses."""

from __future__ import annotations

from torch import Tensor

from flover.kernels.reference.fused import ACTIVATIONS
from flover.layers.base import Layer


class Activation(Layer):
    """An element-wise function by its config.json name.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ops.activation(x, self.name, batch_invariant=self.batch_invariant)
        return out

    def gated(self, x: Tensor) -> Tensor:
        """x `[num_tokens, 2n]`, gate and up side by side -> act(gate) * up `[num_tokens, n]`."""
        out: Tensor = self.ops.gated(x, self.name, batch_invariant=self.batch_invariant)
        return out
