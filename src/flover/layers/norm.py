"""Normalisation over the last dimension; half precision is normalised in fp32, as transformers does."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from flover.layers.base import Layer
from flover.layers.linear import Linear
from flover.parallel import Partial


class Norm(Layer):
    """What the two norms share: both add to the residual stream on the way."""

    def forward(self, x: Tensor | Partial) -> Tensor:
        return self.add(x.whole() if isinstance(x, Partial) else x, None)[0]

    @overload
    def add(self, x: Tensor, delta: Tensor | Partial | None) -> tuple[Tensor, Tensor]: ...

    @overload
    def add(self, x: Tensor, delta: Tensor | Partial | None, into: Linear) -> tuple[Any, Tensor]: ...

    def add(self, x: Tensor, delta: Tensor | Partial | None, into: Linear | None = None) -> tuple[Any, Tensor]:
        """The residual step in one pass: (norm(x + delta), x + delta).

        into: the layer that reads the first; tokens that it wants in 8 bits (`Linear.token_dtype`) become so here.
        """
        options: dict[str, Any] = {"quantise": None if into is None else into.token_dtype}
        if isinstance(delta, Partial):
            exchange = delta.group.exchange
            if exchange is not None and exchange.fits(delta.part):
                delta, options["exchange"] = delta.part, exchange  # the kernel takes the sum
            else:
                delta = delta.whole()
        return self._add(x, delta, options)

    def _add(self, x: Tensor, delta: Tensor | None, options: dict[str, Any]) -> tuple[Any, Tensor]:
        raise NotImplementedError


class RMSNorm(Norm):
    """x / rms(x) * weight (Zhang & Sennrich 2019). `unit_offset`: the weight is stored minus one (Gemma)."""

    def __init__(self, dim: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.unit_offset = eps, unit_offset

    def _add(self, x: Tensor, delta: Tensor | None, options: dict[str, Any]) -> tuple[Any, Tensor]:
        out: tuple[Any, Tensor] = self.ops.rms_norm(
            x, self.weight, self.eps, unit_offset=self.unit_offset, residual=delta, **options
        )
        return out


class LayerNorm(Norm):
    """(x - mean) / std * weight + bias; `affine=False` has neither."""

    def __init__(self, dim: int, eps: float, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False) if affine else None
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False) if affine and bias else None
        self.eps = eps

    def _add(self, x: Tensor, delta: Tensor | None, options: dict[str, Any]) -> tuple[Any, Tensor]:
        out: tuple[Any, Tensor] = self.ops.layer_norm(x, self.weight, self.bias, self.eps, residual=delta, **options)
        return out
