"""The product of few rows, split and not, against float64; and the one whose rows do not depend on each other."""

import pytest
import torch
from triton_device import DEVICE, DTYPES

from flover.kernels.triton.linear import Tiling, _launch, linear, tiling


def reference(x, weight, bias):
    out = x.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("split", "shape"), [(1, (96, 160)), (2, (128, 256)), (4, (64, 512)), (3, (70, 200))])
def test_a_split_product(rows, split, shape, dtype):
    x = torch.randn(rows, shape[1] + 3, device=DEVICE).to(dtype)[:, : shape[1]]
    weight, bias = torch.randn(*shape, device=DEVICE).to(dtype), torch.randn(shape[0], device=DEVICE).to(dtype)
    for b in (None, bias):
        want = reference(x, weight, b)
        for _ in range(2):  # the arrival counters are back at zero
            got = _launch(x, weight, b, 64 if rows > 16 else 16, Tiling(32, 64, split, 2, 4))
            tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
            assert (got.double() - want).norm() / want.norm() < tolerance


def test_rows_of_the_invariant_product_have_the_same_bits_alone(dtype):
    x, weight = torch.randn(70, 96, device=DEVICE).to(dtype), torch.randn(100, 96, device=DEVICE).to(dtype)
    together = linear(x, weight, None, batch_invariant=True)
    for some in (slice(0, 1), slice(3, 20), slice(65, 70)):
        assert torch.equal(linear(x[some], weight, None, batch_invariant=True), together[some])


def test_the_tiling_fills_the_gpu_or_leaves_it_to_cublas():
    assert tiling(1, 4096, 4096, 132) == Tiling(64, 128, 2, 6, 4)
    assert tiling(1, 28672, 4096, 132) is None  # wide: cuBLAS streams it as fast
    assert tiling(1, 4096, 4000, 132) is None  # no whole tiles


@pytest.mark.skipif(DEVICE.type != "cuda" or len(DTYPES) < 3, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64])
def test_true_shapes(rows):
    for n, k in ((4096, 4096), (4096, 14336)):
        x, weight = (torch.randn(*s, device=DEVICE, dtype=torch.bfloat16) for s in ((rows, k), (n, k)))
        want = reference(x, weight, None)
        assert (linear(x, weight, None).double() - want).norm() / want.norm() < 4e-3
