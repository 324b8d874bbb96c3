"""What one product does besides (GPT-J's two layers, an activation, a sum) is what steps of their own do, however its
weight is stored.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flover.layers.activation import Activation
from flover.layers.linear import Linear, QKVUpLinear

pytestmark = pytest.mark.parametrize("stored", ["plain", "packed", "int8", "fp8_w8a8"])


def store(layer: Linear, weight: Tensor, bias: Tensor | None, stored: str) -> None:
    layer.quantization = "none" if stored == "packed" else stored.replace("plain", "none")
    if layer.quantization == "none":
        layer.weight = nn.Parameter(weight, requires_grad=False)
    else:
        layer.quantise(weight)
    if stored == "packed":
        layer.pack()
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random) for shape in shapes]


def test_one_product_is_two_layers(stored: str) -> None:
    forked, qkv, up = QKVUpLinear(32, 4, 2, 8, 24), Linear(32, 64), Linear(32, 24, bias=True)
    weight, bias, x = randoms((88, 32), (24,), (5, 32))
    store(forked, weight, bias, stored)
    store(qkv, weight[:64], None, stored)
    store(up, weight[64:], bias, stored)
    act = Activation("gelu_new")
    q, k, v, mlp = forked(x, act)
    assert (q.shape, k.shape, v.shape, mlp.shape) == ((5, 4, 8), (5, 2, 8), (5, 2, 8), (5, 24))
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in (q, k, v)], 1), qkv(x))
    torch.testing.assert_close(mlp, act(up(x)))


def test_an_activation_and_a_sum_are_those_of_the_product(stored: str) -> None:
    layer, act = Linear(32, 24, bias=True), Activation("gelu_new")
    weight, bias, x, add = randoms((24, 32), (24,), (5, 32), (5, 24))
    store(layer, weight, bias, stored)
    torch.testing.assert_close(layer(x, act=act), act(layer(x)))
    torch.testing.assert_close(layer(x, add=add), layer(x) + add)
