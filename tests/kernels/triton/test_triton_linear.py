"""Products of few rows, split and not, of gate and up, and those whose rows do not depend on each other, in float64."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from triton_device import DEVICE, DTYPES

from flover.kernels import reference as reference_ops
from flover.kernels.reference import gated
from flover.kernels.triton import activation, wide
from flover.kernels.triton.linear import (
    End,
    Tiling,
    _launch,
    _launch_one,
    _library,
    forked_linear,
    gated_linear,
    linear,
    tiling,
)


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


@pytest.mark.parametrize("shape", [(64, 160), (70, 97)])
def test_one_row(shape, dtype):
    x, weight = torch.randn(1, shape[1], device=DEVICE).to(dtype), torch.randn(*shape, device=DEVICE).to(dtype)
    for bias in (None, torch.randn(shape[0], device=DEVICE).to(dtype)):
        want = reference(x, weight, bias)
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
        assert (_launch_one(x, weight, bias).double() - want).norm() / want.norm() < tolerance
        got, want = _launch_one(x, weight, bias, End("silu")).double(), gated(want.to(dtype), "silu").double()
        assert (got - want).norm() / want.norm() < 1e-2


def test_rows_of_the_invariant_product_have_the_same_bits_alone(dtype):
    x, weight = torch.randn(70, 96, device=DEVICE).to(dtype), torch.randn(100, 96, device=DEVICE).to(dtype)
    together = linear(x, weight, None, batch_invariant=True)
    for some in (slice(0, 1), slice(3, 20), slice(65, 70)):
        assert torch.equal(linear(x[some], weight, None, batch_invariant=True), together[some])


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_becomes_of_a_product_is_rounded_as_in_steps_of_its_own(rows, split, dtype):
    x, weight, bias, add = (
        torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((rows, 256), (96, 256), (96,), (rows, 96))
    )

    def launch(end):
        if rows == 1 and split == 1:
            return _launch_one(x, weight, bias, end)
        return _launch(x, weight, bias, 16, Tiling(32, 64, split, 2, 4), end)

    plain = launch(End())
    assert torch.equal(launch(End(add=add)), plain + add)
    for name in ("gelu_new", "relu"):
        assert torch.equal(launch(End(act=name)), activation(plain, name))
    fork, bias = 40, bias[40:]
    forked = launch(End(act="relu", fork=fork))
    assert torch.equal(forked[:, fork:], activation(plain[:, fork:], "relu"))
    bias = None
    assert torch.equal(forked[:, :fork], launch(End())[:, :fork])


@pytest.mark.parametrize("chosen", [None, Tiling(32, 64, 1, 2, 4)], ids=["cuBLAS", "tiles"])
def test_what_becomes_of_a_product_is_the_twins_whoever_multiplies(chosen, dtype, monkeypatch):
    """And of one of two layers that read the same tokens."""
    monkeypatch.setattr(sys.modules[linear.__module__], "_tiling_for", lambda x, weight: chosen)
    shapes = (7, 128), (100, 128), (100,), (36,), (7, 100)
    x, weight, bias, up_bias, add = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes)
    wide = [t.double() for t in (x, weight, bias, up_bias, add)]
    for invariant in (False, True):
        got = linear(x, weight, bias, act="relu", add=add, batch_invariant=invariant)
        forked = forked_linear(x, weight, up_bias, "gelu_new", 64, batch_invariant=invariant)
        want = reference_ops.linear(*wide[:3], act="relu", add=wide[4])
        wanted = reference_ops.forked_linear(*wide[:2], wide[3], "gelu_new", 64)
        for ours, theirs in zip((got, *forked), (want, *wanted), strict=True):
            assert ours.shape == theirs.shape
            assert (ours.double() - theirs).norm() / theirs.norm() < {torch.float32: 1e-5}.get(dtype, 6e-3)


def test_gate_and_up_in_one_launch(dtype):
    x, weight = torch.randn(5, 128, device=DEVICE).to(dtype), torch.randn(128, 128, device=DEVICE).to(dtype)
    for bias in (None, torch.randn(128, device=DEVICE).to(dtype)):
        for name in ("silu", "gelu"):
            got = _launch(x, weight, bias, 16, Tiling(32, 64, 1, 2, 4), End(name)).double()
            want = gated(reference(x, weight, bias).to(dtype), name).double()
            assert (got - want).norm() / want.norm() < {torch.float32: 1e-5}.get(dtype, 1e-2)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
@pytest.mark.parametrize("k", [1024, 1088])
def test_gate_and_up_of_any_depth_that_is_cut(k, dtype, monkeypatch):
    """Whole tiles of 64 are enough, as of a hidden size of 2,880."""
    monkeypatch.setattr(sys.modules[gated_linear.__module__], "_tiling_for", lambda x, w: tiling(len(x), *w.shape, 12))
    x, weight = torch.randn(20, k, device=DEVICE).to(dtype), torch.randn(1024, k, device=DEVICE).to(dtype)
    assert tiling(20, *weight.shape, 12) == Tiling(64, 64, 1, 6, 4)
    got, want = gated_linear(x, weight, None, "silu"), gated(reference(x, weight, None).to(dtype), "silu")
    assert (got.double() - want.double()).norm() / want.double().norm() < 1e-2


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
@pytest.mark.parametrize(("rows", "features"), [(65, 112), (128, 64), (33, 80), (64, 144), (600, 128)])
def test_gate_and_up_in_tiles_that_are_no_power_of_two(rows, features, dtype, monkeypatch):
    """Rows and features end within a tile, the last group of tiles is short, and rows of x lie apart."""
    monkeypatch.setattr(wide, "GROUP", 2)
    x = torch.randn(rows, 200, device=DEVICE).to(dtype)[:, :192]
    weight = torch.randn(2 * 216, 192, device=DEVICE).to(dtype)
    for name in ("silu", "gelu"):
        got = wide.gated_wide(x, weight, name, wide.Cut(features, 3))
        want = gated(reference(x, weight, None).to(dtype), name)
        assert (got.double() - want.double()).norm() / want.double().norm() < 1e-3


@pytest.mark.parametrize("num_sms", [114, 132])
def test_all_programs_of_gate_and_up_run_at_once(num_sms):
    shared = 233472
    for width in range(6400, 24000, 96):
        for rows in (64, 65):
            if (cut := wide.cut(rows, width, num_sms, shared)) is not None:
                assert 0.8 * num_sms <= -(-width // cut.features) <= num_sms
                assert sum(p for p in (128, 64, 32, 16) if cut.features & p) == cut.features
                assert cut.features.bit_count() <= 3
                assert cut.num_stages * 128 * ((64 if rows == 64 else 128) + 2 * cut.features) < shared - 1024
    assert wide.cut(96, 14336, 132, shared) == (112, 4)
    assert wide.cut(96, 17920, 132, shared) == (144, 4)
    assert wide.cut(96, 28672, 132, shared) is None  # too many features for one program
    assert wide.cut(96, 11008, 148, shared) is None  # 80 features a program
    assert wide.cut(96, 14336, 132, 101376) is None
    assert wide.cut(5000, 14336, 132, shared) == wide.cut(900, 14336, 132, shared) == (128, 3)
    for rows, width, room in ((896, 14336, shared), (900, 7168, shared), (8, 200000, shared), (5000, 14336, 101376)):
        assert wide.cut(rows, width, 132, room) is None


def test_which_gate_and_up_are_one_launch(monkeypatch):
    """What TMA cannot address, and who asks for more, takes two."""
    module = sys.modules[gated_linear.__module__]
    gpu = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(wide, "launch_options", lambda device: {"PDL": True})
    monkeypatch.setattr(module, "gated_wide", lambda *_: "one")
    monkeypatch.setattr(module, "linear", lambda *_, **__: None)
    monkeypatch.setattr(module, "gated", lambda *_: "two")

    def launches(x, k=4096, bias=None, **invariant):
        return gated_linear(x, torch.empty(28672, k, dtype=x.dtype, device="meta"), bias, "silu", **invariant)

    def tokens(rows, k=4096, dtype=torch.bfloat16, apart=0, off=0):
        return torch.empty(rows * (k + apart) + off, dtype=dtype)[off:].view(rows, -1)[:, :k]

    for rows in (33, 96, 128, 900, 5000):
        assert launches(tokens(rows)) == launches(tokens(rows, apart=8)) == launches(tokens(rows, off=8)) == "one"
    assert launches(tokens(96, apart=4)) == launches(tokens(96, off=4)) == launches(tokens(129)) == "two"
    assert launches(tokens(896)) == "two"
    assert launches(tokens(96, dtype=torch.float32)) == launches(tokens(96, 4160), 4160) == "two"
    assert launches(tokens(96), bias=tokens(1)) == launches(tokens(96), batch_invariant=True) == "two"
    monkeypatch.setattr(wide, "launch_options", lambda device: {"PDL": False})
    assert launches(tokens(96)) == "two"


@pytest.mark.parametrize(("features", "deep"), [(101, False), (48, True)])
def test_what_the_library_is_asked_in_another_way(features, deep, dtype, monkeypatch):
    """An odd number of features, and a weight with twice as many inputs as outputs."""
    x, weight = torch.randn(70, 96, device=DEVICE).to(dtype), torch.randn(features, 96, device=DEVICE).to(dtype)
    asked = []
    monkeypatch.setattr(F, "linear", lambda x, w, bias, plain=F.linear: asked.append(bias) or plain(x, w, bias))
    got, want = _library(x, weight, None), reference(x, weight, None)
    assert got.shape == want.shape
    assert (got.double() - want).norm() / want.norm() < {torch.float32: 1e-6}.get(dtype, 6e-3)
    assert any(bias is not None for bias in asked) == (deep and dtype.itemsize == 2)


def test_every_tiling_divides_its_shape():
    """A product is cut in whole tiles, or left to cuBLAS."""
    for rows in (1, 8, 9, 16, 17, 32, 33, 64, 128):
        for n in (1600, 4096, 4800, 5120, 6144, 6656, 8192, 10240, 11008, 12288, 16384, 28672):
            for k in (1600, 4096, 5120, 6656, 11008, 13824, 14336, 16384):
                t = tiling(rows, n, k, 132)
                assert t is None or (n % t.block_n == 0 and k % (t.block_k * t.split_k) == 0)
    assert tiling(1, 4096, 4096, 132) == Tiling(64, 128, 2, 6, 4)
    assert tiling(8, 5120, 13824, 132) == Tiling(128, 128, 3, 4, 4)
    assert tiling(8, 5120, 5120, 132) is None  # no three equal parts of whole tiles
    assert tiling(8, 8192, 28672, 132) == tiling(8, 28672, 4096, 132) == Tiling(64, 128, 1, 6, 4)  # one round, or many
    assert tiling(32, 12288, 4096, 132) == Tiling(64, 64, 1, 6, 4)  # more than one, side by side
    assert tiling(8, 6144, 4096, 132) == Tiling(64, 64, 4, 6, 4)
    assert tiling(64, 6144, 4096, 132) == Tiling(64, 128, 1, 5, 4)
    assert tiling(129, 4096, 4096, 132) is None


@pytest.mark.skipif(DEVICE.type != "cuda" or len(DTYPES) < 3, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 128])
def test_true_shapes(rows):
    for n, k in ((4096, 4096), (4096, 14336), (6144, 4096), (5120, 13824), (6656, 6656), (10240, 8192)):
        x, weight = (torch.randn(*s, device=DEVICE, dtype=torch.bfloat16) for s in ((rows, k), (n, k)))
        want = reference(x, weight, None)
        assert (linear(x, weight, None).double() - want).norm() / want.norm() < 4e-3


@pytest.mark.skipif(DEVICE.type != "cuda" or len(DTYPES) < 3, reason="needs a GPU")
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (27648, 5120), (22016, 4096), (35840, 6656)])
def test_true_shapes_of_gate_and_up(n, k):
    weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    for rows in (33, 64, 65, 96, 128):
        x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
        if torch.cuda.get_device_capability() == (9, 0):
            assert wide.cut_for(x, weight) is not None
        got, want = gated_linear(x, weight, None, "silu"), gated(reference(x, weight, None).bfloat16(), "silu")
        assert (got.double() - want.double()).norm() / want.double().norm() < 6e-3
