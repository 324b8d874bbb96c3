"""Products with 8-bit weights against their twins. Only a GPU is asked to round to fp8: the interpreter cuts."""

import pytest
import torch
from triton_device import DEVICE, DTYPES

from flover.kernels import reference, triton
from flover.kernels.reference.quantised import quantise_rows
from flover.kernels.triton import quantised
from flover.kernels.triton.product import End, Scales, Tiling, _launch, _launch_one

INT8, FP8 = torch.int8, torch.float8_e4m3fn
GPU = DEVICE.type == "cuda"
FAST = DTYPES if GPU else [torch.float16]  # the interpreter takes its time
needs_gpu = pytest.mark.skipif(not GPU or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8")
WEIGHTS = [INT8, FP8]
KINDS = [(INT8, False), (FP8, False), (INT8, True), pytest.param(FP8, True, marks=needs_gpu)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def some(rows, shape, dtype, kind):
    x = torch.randn(rows, shape[1] + 3, device=DEVICE).to(dtype)[:, : shape[1]]
    weight, scale = quantise_rows(
        torch.randn(*shape, device=DEVICE) * (1 + torch.rand(shape[0], 1, device=DEVICE)), kind
    )
    return x, weight, scale, torch.randn(shape[0], device=DEVICE).to(dtype)


def close(got, want, dtype, slack=1.0, kind=None):
    """kind: of both factors; sums of fp8 products are kept in less than fp32 by the matrix unit."""
    assert got.dtype == want.dtype == dtype
    tolerance = max(TOLERANCE[dtype], 3e-4) if kind == FP8 else TOLERANCE[dtype]
    assert (got.double() - want.double()).norm() <= slack * tolerance * want.double().norm()


def in_8_bits(x, kind, scale, quantise_x):
    tokens, token_scale = quantise_rows(x, kind) if quantise_x else (x, None)
    return tokens, Scales(scale, token_scale, x.dtype)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("shape", [(64, 160), (30, 97)])
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_one_row(shape, kind, quantise_x, dtype):
    x, weight, scale, bias = some(1, shape, dtype, kind)
    tokens, scales = in_8_bits(x, kind, scale, quantise_x)
    for b in (None, bias):
        want = reference.quantised_linear(x, weight, scale, b, quantise_x=quantise_x)
        close(_launch_one(tokens, weight, b, End(), scales, (8, 64, 4)), want, dtype)
        got = _launch_one(tokens, weight, b, End("silu"), scales, (4, 128, 4))
        close(got, reference.gated(want, "silu"), dtype, 3)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize(
    ("rows", "split", "shape"), [(33, 1, (96, 160)), (5, 2, (64, 256)), (5, 3, (70, 200)), (33, 4, (64, 256))]
)
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_a_split_product(rows, split, shape, kind, quantise_x, dtype):
    x, weight, scale, bias = some(rows, shape, dtype, kind)
    tokens, scales = in_8_bits(x, kind, scale, quantise_x)
    for b in (None, bias):
        want = reference.quantised_linear(x, weight, scale, b, quantise_x=quantise_x)
        for _ in range(2):  # the arrival counters are back at zero
            got = _launch(tokens, weight, b, 64 if rows > 16 else 16, Tiling(32, 64, split, 2, 4), scales=scales)
            close(got, want, dtype)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_gate_and_up_in_one_launch(kind, quantise_x, dtype):
    x, weight, scale, bias = some(5, (128, 128), dtype, kind)
    tokens, scales = in_8_bits(x, kind, scale, quantise_x)
    for b in (None, bias):
        want = reference.quantised_gated_linear(x, weight, scale, b, "gelu", quantise_x=quantise_x)
        close(_launch(tokens, weight, b, 16, Tiling(32, 64, 1, 2, 4), End("gelu"), scales), want, dtype, 10)


@pytest.mark.parametrize("kind", [INT8, pytest.param(FP8, marks=needs_gpu)])
def test_tokens_in_8_bits(kind, dtype):
    x = torch.randn(9, 101, device=DEVICE).to(dtype)[:, :99] * 3
    x[1], x[2, 5], x[3, 7] = 0, float("nan"), float("inf")
    x[4, 0], x[4, 1:8] = 127, torch.arange(-3, 4, device=DEVICE) + 0.5  # ties
    q, scale, dtype_of_x = quantised.quantise_tokens(x, kind)
    assert dtype_of_x == dtype
    want, want_scale = quantise_rows(x, kind)
    good = [0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(scale[good], want_scale[good])
    assert torch.equal(q[good].float(), want[good].float())
    assert not torch.isfinite(scale[2:4]).any()


@pytest.mark.parametrize("kind", [INT8, pytest.param(FP8, marks=needs_gpu)])
def test_tokens_that_a_norm_or_a_gate_makes(kind, dtype):
    """In 8 bits at once or in two launches: the same bits."""
    x = torch.randn(5, 202, device=DEVICE).to(dtype)[:, :198] * 3
    x[1], x[2, 5] = 0, float("nan")
    weight, residual = torch.randn(198, device=DEVICE).to(dtype), torch.randn(5, 198, device=DEVICE).to(dtype)
    makers = [
        lambda **q: triton.rms_norm(x, weight, 1e-6, residual=residual, **q)[0],
        lambda **q: triton.rms_norm(x, weight, 1e-6, unit_offset=True, **q)[0],
        lambda **q: triton.layer_norm(x, weight, weight, 1e-6, **q)[0],
        lambda **q: triton.gated(x, "silu", **q),
    ]
    for make in makers:
        got, want = make(quantise=kind), quantised.quantise_tokens(make(), kind)
        good = [0, 1, 3, 4]
        assert torch.equal(got.values[good].float(), want.values[good].float())
        assert torch.equal(got.scale[good], want.scale[good])
        assert got.scale[2].isnan()
        assert got.dtype == want.dtype


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_written_out(kind, dtype):
    _, weight, scale, _ = some(1, (33, 70), dtype, kind)
    assert torch.equal(quantised.dequantise(weight, scale, dtype), (weight.float() * scale[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize(
    ("rows", "shape"), [(1, (64, 128)), (1, (50, 70)), (6, (64, 128)), (6, (50, 70)), (27, (48, 80))]
)
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_every_way_of_a_layer(rows, shape, kind, quantise_x, dtype, monkeypatch):
    """One row, few and many, gated, shapes that are no whole tiles; the library's product in slices."""
    monkeypatch.setattr(quantised, "MAX_ROWS", 20)
    monkeypatch.setattr(quantised, "MAX_ROWS_8_BIT", 20)
    monkeypatch.setattr(quantised, "SLICE", 18)
    x, weight, scale, bias = some(rows, shape, dtype, kind)
    want = reference.quantised_linear(x, weight, scale, bias, quantise_x=quantise_x)
    both = kind if quantise_x else None
    close(quantised.quantised_linear(x, weight, scale, bias, quantise_x=quantise_x), want, dtype, 2, both)
    got = quantised.quantised_gated_linear(x, weight, scale, bias, "silu", quantise_x=quantise_x)
    close(got, reference.gated(want, "silu"), dtype, 10, both)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_rows_of_the_invariant_product_have_the_same_bits_alone(kind, quantise_x, dtype):
    x, weight, scale, _ = some(70, (50, 96), dtype, kind)
    modes = {"quantise_x": quantise_x, "batch_invariant": True}
    together = quantised.quantised_linear(x, weight, scale, None, **modes)
    for part in (slice(0, 1), slice(3, 20), slice(65, 70)):
        assert torch.equal(quantised.quantised_linear(x[part], weight, scale, None, **modes), together[part])


def test_tilings():
    """Split along K only in whole tiles, within the shared memory of a multiprocessor."""
    for rows in (1, 8, 16, 17, 32, 33, 64, 65, 128, 256):
        for n in (768, 1600, 4096, 6144, 11008, 28672):
            for k in (688, 1600, 4096, 5120, 11008, 14336):
                t = quantised.tiling(rows, n, k, 132)
                assert t.split_k == 1 or k % (t.block_k * t.split_k) == 0
                block_m = quantised.block_m(rows)
                assert t.num_stages * t.block_k * (t.block_n + 2 * block_m) <= 220 * 1024
    assert quantised.tiling(8, 4096, 4096, 132).split_k == 2


@needs_gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32, 33, 64, 65, 128, 256, 300])
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_true_shapes(rows, kind, quantise_x):
    for shape in ((4096, 4096), (6144, 4096), (4096, 14336)):
        x, weight, scale, _ = some(rows, shape, torch.bfloat16, kind)
        want = reference.quantised_linear(x, weight, scale, None, quantise_x=quantise_x)
        close(quantised.quantised_linear(x, weight, scale, None, quantise_x=quantise_x), want, torch.bfloat16)
    x, weight, scale, _ = some(rows, (28672, 4096), torch.bfloat16, kind)
    want = reference.quantised_gated_linear(x, weight, scale, None, "silu", quantise_x=quantise_x)
    got = quantised.quantised_gated_linear(x, weight, scale, None, "silu", quantise_x=quantise_x)
    close(got, want, torch.bfloat16, 2)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 128, 300])
@pytest.mark.parametrize(("kind", "quantise_x"), KINDS)
def test_a_captured_product_repeats(rows, kind, quantise_x):
    x, weight, scale, _ = some(rows, (4096, 4096), torch.bfloat16, kind)
    eager = quantised.quantised_linear(x, weight, scale, None, quantise_x=quantise_x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantised.quantised_linear(x, weight, scale, None, quantise_x=quantise_x)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
