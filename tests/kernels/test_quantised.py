"""The twins of 8-bit products against loops in Python, and what a scale must survive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flover.kernels.reference import gated, quantised_gated_linear, quantised_linear
from flover.kernels.reference.quantised import LARGEST, quantise_rows
from flover.layers.linear import QUANTISED, Linear

KINDS = list(QUANTISED.values())


def nearest(value: float, dtype: torch.dtype) -> float:
    """The value of the 8-bit type that is nearest, by looking at all of them; ties to the even mantissa."""
    codes = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.int8:
        every = [(float(c), int(c) % 2) for c in range(-127, 128)]
    else:
        values = codes.view(torch.float8_e4m3fn).float()
        every = [(float(v), int(c) % 2) for v, c in zip(values, codes) if bool(torch.isfinite(v))]
    return min(every, key=lambda entry: (abs(entry[0] - value), entry[1]))[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_element_is_the_nearest_value(kind: torch.dtype) -> None:
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [30.0], [1e6]])
    q, scale = quantise_rows(x, kind)
    assert q.dtype == kind
    assert scale.dtype == torch.float32
    for row in range(4):
        largest = max(abs(float(v)) for v in x[row])
        assert float(scale[row]) == pytest.approx(largest / LARGEST[kind], rel=1e-6)
        for value, code in zip(x[row] / scale[row], q[row].float()):
            assert float(code) == nearest(float(value), kind)
        assert float(q[row].float().abs().max()) == LARGEST[kind]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_zeros_and_rows_that_are_not_finite(kind: torch.dtype) -> None:
    weight, scale = quantise_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), kind)
    assert torch.isfinite(scale).all()
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0.0, 0.0], [3.0, 1.0], [nan, 1.0], [1.0, inf]])
    for quantise_x in (False, True):
        out = quantised_linear(x, weight, scale, None, quantise_x=quantise_x)
        assert (out[:2, 0] == 0).all()
        assert float(out[1, 1]) == pytest.approx(1.0, abs=0.1)
        assert not torch.isfinite(out[2:, 1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("quantise_x", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_against_loops(kind: torch.dtype, quantise_x: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    x, bias = torch.randn(3, 21, generator=random).to(dtype), torch.randn(6, generator=random).to(dtype)
    weight, scale = quantise_rows(torch.randn(6, 21, generator=random), kind)
    tokens, token_scale = quantise_rows(x, kind) if quantise_x else (x, torch.ones(3))
    want = torch.zeros(3, 6, dtype=torch.float64)
    for m in range(3):
        for n in range(6):
            total = sum(float(a) * float(b) for a, b in zip(tokens[m], weight[n]))
            want[m, n] = total * float(token_scale[m]) * float(scale[n]) + float(bias[n])
    got = quantised_linear(x, weight, scale, bias, quantise_x=quantise_x)
    assert got.dtype == dtype
    eps = {torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    assert ((got.double() - want).abs() <= eps * want.abs().clamp_min(1)).all()
    both = quantised_gated_linear(x, weight, scale, bias, "silu", quantise_x=quantise_x)
    assert torch.equal(both, gated(got, "silu"))


@pytest.mark.parametrize("quantise_x", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_invariant_rows_have_the_same_bits_alone(kind: torch.dtype, quantise_x: bool) -> None:
    x = torch.randn(35, 50)
    weight, scale = quantise_rows(torch.randn(31, 50), kind)
    modes = {"quantise_x": quantise_x, "batch_invariant": True}
    together = quantised_linear(x, weight, scale, None, **modes)
    for start in range(0, 35, 10):
        assert torch.equal(
            quantised_linear(x[start : start + 7], weight, scale, None, **modes), together[start : start + 7]
        )
    torch.testing.assert_close(together, quantised_linear(x, weight, scale, None, quantise_x=quantise_x))


@pytest.mark.parametrize("name", ["int8", "fp8", "int8_w8a8", "fp8_w8a8"])
def test_a_layer_in_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 24)

    def layer() -> Linear:
        made = Linear(24, 37)
        made.quantization = name
        made.quantise(weight)
        return made

    whole = layer()
    monkeypatch.setattr("flover.layers.linear.SLICE", 100)
    sliced = layer()
    bits: list[Tensor] = [part.weight.view(torch.uint8) for part in (whole, sliced)]  # type: ignore[union-attr]
    assert torch.equal(*bits)
    assert torch.equal(whole.scale, sliced.scale)  # type: ignore[arg-type]
    sliced.pack()
    assert sliced.packed is None
    x = torch.randn(3, 24)
    ways = [quantised_linear(x, whole.weight, whole.scale, None, quantise_x=q) for q in (False, True)]  # type: ignore[arg-type]
    assert not torch.equal(*ways)
    assert torch.equal(sliced(x), ways["w8a8" in name])
    error = (sliced(x) - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert 1e-4 < error < {"int8": 0.02, "fp8": 0.05}[name.removesuffix("_w8a8")] * (2 if "w8a8" in name else 1)
