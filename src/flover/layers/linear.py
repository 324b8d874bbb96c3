"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flover.kernels.reference.quantised import Tokens, quantise_rows
from flover.layers.activation import Activation
from flover.layers.base import Layer

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SLICE = 1 << 22  # elements of a weight that are quantised at a time


class Linear(Layer):
    """`x @ weight.T + bias`; weight `[out_features, in_features]`, empty until the loader fills it.

    quantization: as in `EngineConfig`; the loader says it before it fills the layer. The weight is then of 8 bits.
    """

    weight: Tensor | None  # None once packed
    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: Tensor | None = None
        self.quantization = "none"
        self.register_parameter("scale", None)  # [out_features] fp32, of a quantised weight

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> None:
        """Take a weight in 8 bits, with a scale per row; slice by slice, so that no copy of it exists in fp32."""
        dtype = QUANTISED[self.quantization.removesuffix("_w8a8")]
        values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        scale = torch.empty(len(weight), device=weight.device)
        step = max(1, SLICE // weight.shape[1])
        for i in range(0, len(weight), step):
            values[i : i + step], scale[i : i + step] = quantise_rows(weight[i : i + step], dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

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

    @property
    def token_dtype(self) -> torch.dtype | None:
        """Of 8 bits, that its tokens become; whoever makes them may do it (`RMSNorm.add`)."""
        return QUANTISED[self.quantization.removesuffix("_w8a8")] if self.quantization.endswith("_w8a8") else None

    def forward(self, x: Tensor | Tokens) -> Tensor:
        if self.packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return product
        out: Tensor
        if self.scale is not None:
            out = self.ops.quantised_linear(x, self.weight, self.scale, self.bias, **self._modes())
        else:
            out = self.ops.linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)
        return out

    def gated(self, x: Tensor | Tokens, act: Activation, into: Linear) -> Tensor | Tokens:
        """act(gate) * up of a layer whose outputs are gate and up, `[num_tokens, 2n]` -> `[num_tokens, n]`.

        into: the layer that reads them.
        """
        if self.packed is not None:
            return act.gated(self(x))
        out: Tensor | Tokens
        if self.scale is not None:
            out = self.ops.quantised_gated_linear(
                x, self.weight, self.scale, self.bias, act.name, quantise=into.token_dtype, **self._modes()
            )
        else:
            out = self.ops.gated_linear(x, self.weight, self.bias, act.name, batch_invariant=self.batch_invariant)
        return out

    def _modes(self) -> dict[str, bool]:
        return {"quantise_x": self.token_dtype is not None, "batch_invariant": self.batch_invariant}
