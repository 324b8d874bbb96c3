"""The one product of GPT-J's queries, keys, values and MLP is what the two layers are alone, however it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flover.layers.activation import Activation
from flover.layers.linear import Linear, QKVUpLinear


@pytest.mark.parametrize("stored", ["plain", "packed", "int8", "fp8_w8a8"])
def test_one_product_is_two_layers(stored: str) -> None:
    random = torch.Generator().manual_seed(0)
    forked, qkv, up = QKVUpLinear(32, 4, 2, 8, 24), Linear(32, 64), Linear(32, 24, bias=True)
    weight, bias, x = (torch.randn(*shape, generator=random) for shape in ((88, 32), (24,), (5, 32)))
    assert up.bias is not None
    for layer, part in ((forked, weight), (qkv, weight[:64]), (up, weight[64:])):
        layer.quantization = "none" if stored == "packed" else stored.replace("plain", "none")
        if layer.quantization == "none":
            layer.weight = nn.Parameter(part, requires_grad=False)
        else:
            layer.quantise(part)
        if stored == "packed":
            layer.pack()
    forked.bias = up.bias = nn.Parameter(bias, requires_grad=False)
    act = Activation("gelu_new")
    q, k, v, mlp = forked(x, act)
    assert (q.shape, k.shape, v.shape, mlp.shape) == ((5, 4, 8), (5, 2, 8), (5, 2, 8), (5, 24))
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in (q, k, v)], 1), qkv(x))
    torch.testing.assert_close(mlp, up(x, act=act))
