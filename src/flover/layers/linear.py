"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flover.layers.activation import Activation
from flover.layers.base import Layer


class Linear(Layer):
    """`x @ weight.T + bias`; weight `[out_features, in_features]`, empty until the loader fills it."""

    weight: Tensor | None  # None once packed

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Keep the weight only in the order in which oneDNN reads it; for serving fp32 on a CPU, else nothing happens.

        A plain product re-orders the weight at every call, on one thread, which at few rows costs more than it:
        on two AVX2 cores a packed one is 1.3 times as fast at 32 rows, 2 at 16 and 3 at 4.
        """
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32 or self.batch_invariant:
            return
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self.packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return product
        out: Tensor = self.ops.linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)
        return out

    def gated(self, x: Tensor, act: Activation) -> Tensor:
        """act(gate) * up of a layer whose outputs are gate and up, `[num_tokens, 2n]` -> `[num_tokens, n]`."""
        if self.packed is not None:
            return act.gated(self(x))
        out: Tensor = self.ops.gated_linear(x, self.weight, self.bias, act.name, batch_invariant=self.batch_invariant)
        return out
