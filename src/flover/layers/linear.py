"""Linear layers: whole, or divided among the ranks of a group by columns (outputs) or rows (inputs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flover.kernels.reference.quantised import Tokens, quantise_rows
from flover.layers.activation import Activation
from flover.layers.base import Layer
from flover.parallel import Group, Partial
from flover.sharding import Part, Range, kv_split, split

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
        self.in_features = in_features  # of the whole
        self.register_parameter("scale", None)  # [out_features] fp32, of a quantised weight

    @property
    def own_bias(self) -> Tensor | None:
        """What this rank adds."""
        return self.bias

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> None:
        """Take a weight in 8 bits, with a scale per row; slice by slice, so that no copy of it exists in fp32."""
        dtype = QUANTISED[self.quantization.removesuffix("_w8a8")]
        values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        scale = torch.empty(len(weight), device=weight.device)
        step = max(1, SLICE // self.in_features)
        for i in range(0, len(weight), step):
            rows = weight[i : i + step]
            values[i : i + step], scale[i : i + step] = quantise_rows(rows, dtype, self.largest(rows))
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def largest(self, rows: Tensor) -> Tensor:
        """The largest magnitude in each row of the weight, `[n]`."""
        return rows.abs().amax(-1)

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

    def forward(self, x: Tensor | Tokens, act: Activation | None = None, add: Tensor | None = None) -> Tensor:
        """act: of the product. add: is added to that, `[num_tokens, out_features]`."""
        out: Tensor
        if self.packed is not None:
            out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.own_bias, "none", [], "")
        elif self.scale is not None:
            out = self.ops.quantised_linear(x, self.weight, self.scale, self.own_bias, **self._modes())
        else:
            name, invariant = act.name if act else "", self.batch_invariant
            out = self.ops.linear(x, self.weight, self.own_bias, act=name, add=add, batch_invariant=invariant)
            return out
        if act is not None:
            out = act(out)
        return out if add is None else out + add

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


class ColumnLinear(Linear):
    """Divided by outputs: a rank computes its share of each of `sizes`, side by side."""

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__(in_features, sum(sizes), bias)
        self.sizes = tuple(sizes)  # of this rank

    def ranges(self, group: Group) -> list[Range]:
        """A rank's share of each size."""
        return [split(size, group.rank, group.size) for size in self.sizes]

    def shard(self, group: Group) -> Mapping[str, Part]:
        super().shard(group)
        ranges, start = self.ranges(group), 0
        whole = []
        for size, (begin, end) in zip(self.sizes, ranges):
            whole.append((start + begin, start + end))
            start += size
        self.sizes = tuple(end - begin for begin, end in ranges)
        return {name: Part(0, tuple(whole)) for name in ("weight", "bias")}


class QKVLinear(ColumnLinear):
    """The projection to queries, keys and values, divided by heads; a KV head goes to every rank that reads it."""

    def __init__(self, in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False) -> None:
        super().__init__(in_features, [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)], bias)
        self.head_dim = head_dim

    def ranges(self, group: Group) -> list[Range]:
        heads, kv_heads, _ = (size // self.head_dim for size in self.sizes[:3])
        own, shared = split(heads, group.rank, group.size), kv_split(kv_heads, group.rank, group.size)
        return [(begin * self.head_dim, end * self.head_dim) for begin, end in (own, shared, shared)]

    def forward(self, x: Tensor | Tokens) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """q, k and v, each `[num_tokens, heads of this rank, head_dim]`."""
        return self.heads(super().forward(x))

    def heads(self, together: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.view(len(t), -1, self.head_dim) for t in torch.split(together, list(self.sizes[:3]), -1))
        return q, k, v


class QKVUpLinear(QKVLinear):
    """QKV and the way into an MLP that reads the same tokens (GPT-J), in one product. Only the MLP has a bias."""

    def __init__(self, in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, width: int) -> None:
        sizes = [*(n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)), width]
        ColumnLinear.__init__(self, in_features, sizes)
        self.head_dim = head_dim
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)

    @property
    def own_bias(self) -> Tensor | None:
        return None  # of the whole product

    def ranges(self, group: Group) -> list[Range]:
        return [*super().ranges(group), split(self.sizes[3], group.rank, group.size)]

    def shard(self, group: Group) -> Mapping[str, Part]:
        width = split(self.sizes[3], group.rank, group.size)
        return {**super().shard(group), "bias": Part(0, (width,))}

    def forward(  # type: ignore[override]
        self, x: Tensor | Tokens, act: Activation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v as of `QKVLinear`, and what the MLP's second layer reads, `[num_tokens, width of this rank]`."""
        fork, weight, bias = sum(self.sizes[:3]), self.weight, self.bias
        assert bias is not None
        if weight is None:  # packed
            out = Linear.forward(self, x)
            together, up = out[:, :fork], act(out[:, fork:] + bias)
        elif self.scale is not None:
            product = partial(self.ops.quantised_linear, x, **self._modes())
            together = product(weight[:fork], self.scale[:fork], None)
            up = act(product(weight[fork:], self.scale[fork:], bias))
        else:
            together, up = self.ops.forked_linear(x, weight, bias, act.name, fork, batch_invariant=self.batch_invariant)
        return *self.heads(together), up


class RowLinear(Linear):
    """Divided by inputs: a rank multiplies what it has, and the products are to be added. One of them has the bias."""

    def shard(self, group: Group) -> Mapping[str, Part]:
        super().shard(group)
        return {"weight": Part(1, (split(self.in_features, group.rank, group.size),))}

    @property
    def own_bias(self) -> Tensor | None:
        return self.bias if self.group.rank == 0 else None

    def largest(self, rows: Tensor) -> Tensor:
        return self.group.largest(super().largest(rows))

    def forward(self, x: Tensor | Tokens, add: Tensor | Partial | None = None) -> Tensor | Partial:  # type: ignore[override]
        """Among ranks a `Partial`: who reads the output takes the sum, most often a norm (`Norm.add`).

        add: another one's output; parts of two sums are added first, and then it is one sum.
        """
        product = super().forward(x, add=add.part if isinstance(add, Partial) else add)
        return product if self.group.size == 1 else Partial(product, self.group)
