"""Norms, activations, rotation with store, and copies inside the cache, each against its twin."""

import pytest
import torch
from triton_device import DEVICE

from flover.kernels import reference, triton
from flover.kernels.reference import ACTIVATIONS
from flover.kernels.triton import kv_cache
from flover.kernels.triton.rotary import rotary_store

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("rows", "dim"), [(1, 97), (5, 768), (3, 80), (0, 64)])
@pytest.mark.parametrize("add", [False, True])
def test_norms(rows, dim, add, dtype):
    x = randn(rows, dim + 5, dtype=dtype)[:, :dim]
    weight, bias = randn(dim, dtype=dtype), randn(dim, dtype=dtype)
    residual = randn(rows, dim, dtype=dtype) if add else None
    cases = [
        *(lambda ops, o=o: ops.rms_norm(x, weight, 1e-5, unit_offset=o, residual=residual) for o in (False, True)),
        *(lambda ops, b=b: ops.layer_norm(x, weight, b, 1e-5, residual=residual) for b in (bias, None)),
        lambda ops: ops.layer_norm(x, None, None, 1e-5, residual=residual),
    ]
    for case in cases:
        for got, want in zip(case(triton), case(reference), strict=True):
            close(got, want, dtype)


def test_norms_of_heads_in_a_fused_projection(dtype):
    qkv = randn(6, 40, dtype=dtype)
    heads = qkv[:, 8:32].unflatten(-1, (3, 8))
    close(
        triton.rms_norm(heads, qkv[0, :8], 1e-6)[0],
        reference.rms_norm(heads, qkv[0, :8], 1e-6)[0],
        dtype,
    )


def test_a_nan_stays_in_its_row():
    x = torch.randn(3, 64, device=DEVICE)
    x[1, 7] = torch.nan
    normed, _ = triton.rms_norm(x, torch.ones(64, device=DEVICE), 1e-6)
    assert normed.isnan().all(1).tolist() == [False, True, False]


def test_the_strides_of_a_dimension_of_one_mean_nothing():
    x = torch.randn(1, 5, 8, device=DEVICE).transpose(0, 1)  # contiguous, and its rows are 40 apart by stride(-2)
    weight = torch.ones(8, device=DEVICE)
    close(triton.rms_norm(x, weight, 1e-6)[0], reference.rms_norm(x, weight, 1e-6)[0], torch.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 700), (20, 66)])
def test_activations(name, rows, width, dtype):
    x = randn(rows, 2 * width, dtype=dtype) * 3
    close(triton.activation(x, name), reference.activation(x, name), dtype)
    close(triton.gated(x, name), reference.gated(x, name), dtype)
    extremes = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], device=DEVICE)
    close(triton.activation(extremes, name), reference.activation(extremes, name), torch.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan(name, dtype):
    x = torch.tensor([[torch.nan, -1.0, 2.0, 0.0]], device=DEVICE).to(dtype)
    assert triton.activation(x, name).isnan().tolist() == [[True, False, False, False]]
    assert triton.gated(x, name).isnan().tolist() == [[True, False]]
    assert triton.gated(x.flip(1), name).isnan().tolist() == [[False, True]]


def test_activations_of_no_tokens(dtype):
    x = torch.empty(0, 12, dtype=dtype, device=DEVICE)
    assert triton.activation(x, "silu").shape == (0, 12)
    assert triton.gated(x, "silu").shape == (0, 6)


def test_gated_rows_of_a_wider_buffer(dtype):
    x = randn(3, 30, dtype=dtype)[:, 5:27]
    close(triton.gated(x, "silu"), reference.gated(x, "silu"), dtype)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the limit is the GPU's")
def test_more_rows_than_the_second_axis_of_a_grid_takes(dtype):
    x = randn(70_000, 16, dtype=dtype)
    close(triton.gated(x, "silu"), reference.gated(x, "silu"), dtype)
    close(triton.activation(x, "relu"), reference.activation(x, "relu"), dtype)


def test_tables_far_out():
    """fp32 angles of 10^5 and more need a true argument reduction: the hardware's own sine is off by 10^-2 there."""
    positions = torch.tensor([0, 32_767, 131_071, 1_048_575], device=DEVICE)
    inv_freq = 1.0 / 10000 ** (torch.arange(24, device=DEVICE).float() / 24)
    angles = (positions.float()[:, None] * inv_freq).double()[:, None]  # what both are given, rounded once
    for got, want in zip(triton.rotary_tables(positions, inv_freq, torch.float32), (angles.cos(), angles.sin())):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "pairs"), [(4, 4, 16, 8), (6, 2, 20, 10), (4, 1, 24, 4)])
def test_rotation_and_store(heads, kv_heads, head_dim, pairs, interleaved, dtype):
    n, slots = 5, torch.tensor([7, 0, -1, 11, 3], device=DEVICE)
    qkv = randn(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 5, 9, 1, 2000], device=DEVICE, dtype=torch.int32)
    inv_freq = 1.0 / 10000 ** (torch.arange(pairs, device=DEVICE).float() / pairs)
    tables = reference.rotary_tables(positions, inv_freq, dtype)
    for got, want in zip(triton.rotary_tables(positions, inv_freq, dtype), tables, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=2e-4 if dtype == torch.float32 else 8e-3)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    for cos, sin in (tables, (None, None)):

        def run(store, keep, qkv=qkv, cos=cos, sin=sin):
            q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in qkv.clone()[keep].split(sizes, -1))
            caches = [torch.full((13, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"]
            some = (None, None) if cos is None else (cos[keep], sin[keep])
            views = [cache[1:] for cache in caches]  # slot -1 would be the row before
            return store(q, k, v, *some, *views, slots[keep], interleaved=interleaved), *caches

        kept = slots >= 0  # the twin has no padding tokens
        mine, twin = run(rotary_store, torch.ones_like(kept)), run(reference.rotary_store, kept)
        close(mine[0][kept], twin[0], dtype)
        for got, want in zip(mine[1:], twin[1:], strict=True):
            assert torch.equal(got.isnan(), want.isnan())
            close(got.nan_to_num(), want.nan_to_num(), dtype)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 12), (1, 16), (1, 5)])
def test_copies_touch_nothing_else(kv_heads, head_dim, dtype, monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 64)  # several pieces to a move
    caches = [torch.full((8 * 6, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(5)]
    moves = [(0, 5, 6), (3, 1, 1), (4, 2, 5), (6, 7, 0)]
    for cache in caches:
        for src, _, n in moves:  # all but live tokens is NaN
            cache[src * 6 : src * 6 + n] = randn(n, kv_heads, head_dim, dtype=dtype)
    want = [cache.clone() for cache in caches]
    reference.copy_blocks(want, moves, 6)
    triton.copy_blocks(caches, moves, 6)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip(caches, want, strict=True))


def test_more_pieces_than_programs(monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    cache = torch.randn(2 * 150, 1, 5, device=DEVICE)  # 94 pieces, 64 programs
    triton.copy_blocks([cache], [(0, 1, 149)], 150)
    assert torch.equal(cache[150:299], cache[:149])


def test_no_moves():
    triton.copy_blocks([torch.zeros(4, 1, 8, device=DEVICE)], [], 2)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs 10 GB of GPU memory")
def test_a_cache_of_more_than_two_to_the_31_elements():
    size = (2**31 + 2**27) // 64
    caches = [torch.zeros(size, 1, 64, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
    q, k, v = (torch.randn(2, 1, 64, dtype=torch.bfloat16, device=DEVICE) for _ in "qkv")
    slots = torch.tensor([size - 1, 1], device=DEVICE)
    rotary_store(q, k, v, None, None, *caches, slots)
    assert torch.equal(caches[0][slots], k)
    assert torch.equal(caches[1][slots], v)
    triton.copy_blocks(caches, [(size - 1, 5, 1)], 1)
    assert torch.equal(caches[0][5], k[0])
