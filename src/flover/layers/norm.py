"""Normalisation over the last dimension; half precision is normalised in fp32, as transformers does."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from flover.layers.base import Layer
from flover.layers.linear import Linear


class Norm(Layer):
    """What the two norms share: both add to the residual stream on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    @overload
    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]: ...

    @overload
    def add(self, x: Tensor, delta: Tensor | None, into: Linear) -> tuple[Any, Tensor]: ...

    def add(self, x: Tensor, delta: Tensor | None, into: Linear | None = None) -> tuple[Any, Tensor]:
        """The residual step in one pass: (norm(x + delta), x + delta).

        into: the layer that reads the first; tokens that it wants in 8 bits (`Linear.token_dtype`) become so here.
        """
        return self._add(x, delta, None if into is None else into.token_dtype)

    def _add(self, x: Tensor, delta: Tensor | None, quantise: torch.dtype | None) -> tuple[Any, Tensor]:
        raise NotImplementedError


class RMSNorm(Norm):
    """x / rms(x) * weight (Zhang & Sennrich 2019). `unit_offset`: the weight is stored minus one (Gemma)."""

    def __init__(self, dim: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.unit_offset = eps, unit_offset

    def _add(self, x: Tensor, delta: Tensor | None, quantise: torch.dtype | None) -> tuple[Any, Tensor]:
        out: tuple[Any, Tensor] = self.ops.rms_norm(
            x, self.weight, self.eps, unit_offset=self.unit_offset, residual=delta, quantise=quantise
        )
        return out


class LayerNorm(Norm):
    """(x - mean) / std * weight + bias; `affine=False` has neither."""

    def __init__(self, dim: int, eps: float, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False) if affine else None
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False) if affine and bias else None
        self.eps = eps

    def _add(self, x: Tensor, delta: Tensor | None, quantise: torch.dtype | None) -> tuple[Any, Tensor]:
        out: tuple[Any, Tensor] = self.ops.layer_norm(
            x, self.weight, self.bias, self.eps, residual=delta, quantise=quantise
        )
        return out
