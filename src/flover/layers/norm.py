"""Normalisation over the last dimension; half precision is normalised in fp32, as transformers does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flover.layers.base import Layer


class RMSNorm(Layer):
    """x / rms(x) * weight (Zhang & Sennrich 2019). `unit_offset`: the weight is stored minus one (Gemma)."""

    def __init__(self, dim: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual step in one pass: (norm(x + delta), x + delta)."""
        out: tuple[Tensor, Tensor] = self.ops.rms_norm(
            x, self.weight, self.eps, unit_offset=self.unit_offset, residual=delta
        )
        return out


class LayerNorm(Layer):
    """(x - mean) / std * weight + bias; `affine=False` has neither."""

    def __init__(self, dim: int, eps: float, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False) if affine else None
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False) if affine and bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual step in one pass: (norm(x + delta), x + delta)."""
        out: tuple[Tensor, Tensor] = self.ops.layer_norm(x, self.weight, self.bias, self.eps, residual=delta)
        return out
