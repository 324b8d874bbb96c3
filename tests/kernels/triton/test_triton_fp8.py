"""An fp8 KV cache. Triton's interpreter reads fp8 as it is but rounds wrongly and knows no NaN when it makes some, so
there stores are of numbers that fp8 holds; rounding and NaN are compared on a GPU (of compute capability 8.9 on)."""

import pytest
import torch
from test_triton_attention import TOLERANCE, Batch, check
from triton_device import DEVICE

from flover.kernels import reference
from flover.kernels.triton import copy_blocks, poison_blocks
from flover.kernels.triton.attention import invariant_tiles
from flover.kernels.triton.rotary import rotary_store

E4M3 = torch.float8_e4m3fn
GPU = DEVICE.type == "cuda"
OLD = GPU and torch.cuda.get_device_capability() < (8, 9)
pytestmark = pytest.mark.skipif(OLD, reason="this GPU has no fp8")


def fp8_batch(q_lens, seq_lens, heads, kv_heads, head_dim, dtype, **options):
    batch = Batch(q_lens, seq_lens, heads, kv_heads, head_dim, dtype, **options)
    batch.k, batch.v = batch.k.to(E4M3), batch.v.to(E4M3)
    return batch


@pytest.mark.parametrize("options", [{}, {"window": 40}], ids=str)
@pytest.mark.parametrize("block_size", [16, 256])
def test_attention(block_size, options, dtype):
    batch = fp8_batch([1, 1, 9, 70], [9, 200, 40, 90], 4, 2, 24, dtype, block_size=block_size)
    check(batch, dtype, num_decode=2, scale=0.2, **options)


def test_invariant_mode_is_bitwise(dtype):
    batch = fp8_batch([40], [40], 4, 2, 16, dtype)
    options = {"scale": 0.25, "batch_invariant": True}
    whole = batch.attend(batch.meta(0, invariant_tiles([40], [40])), **options)
    _, want = batch.expected(scale=0.25)
    assert (whole.double() - want).abs().max() < 2 * TOLERANCE[dtype]
    batch.q, batch.q_lens, batch.starts = batch.q[39:], [1], batch.starts * 0 + [0, 1]
    last = batch.attend(batch.meta(0, invariant_tiles([1], [40])), **options)
    assert torch.equal(last, whole[39:])


def stored(values, dtype, store):
    """Keys and values [tokens, 2, 8] through a fused projection into caches, at shuffled slots; one is not stored."""
    n = len(values)
    qkv = torch.cat([values * 0, values, -values], 1).to(DEVICE, dtype)
    q, k, v = (part.unflatten(-1, (2, 8)) for part in qkv.split(16, -1))
    caches = [torch.full((n + 4, 2, 8), 3.0).to(DEVICE, E4M3) for _ in "kv"]
    slots = torch.randperm(n + 4, generator=torch.Generator().manual_seed(0))[:n].to(DEVICE)
    store(q, k, v, None, None, *caches, slots)
    return [cache.float().nan_to_num(777.0) for cache in caches]


def test_stores_saturate_and_keep_what_fp8_holds(dtype):
    grid = torch.arange(-120, 121, dtype=torch.float32)
    exact = torch.cat([grid[grid.abs() <= 16], torch.tensor([448.0, -448.0, 0.25, -3.5, 26.0, 0.015625, 320.0])])
    beyond = torch.tensor([449.0, -500.0, 6e4, -6e4, torch.inf, -torch.inf, 448.0, 464.0])
    values = torch.cat([exact, beyond]).view(3, 16)
    got, want = (stored(values, dtype, store) for store in (rotary_store, reference.rotary_store))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_stores_round_as_the_twin_and_keep_nan(dtype):
    g = torch.Generator().manual_seed(1)
    values = torch.randn(64, 16, generator=g) * 10.0 ** torch.randint(-4, 4, (64, 16), generator=g)
    values[5, 3] = values[9, 0] = torch.nan
    got, want = (stored(values, dtype, store) for store in (rotary_store, reference.rotary_store))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert (got[0] == 777.0).sum() == 2


def test_copies_and_poison():
    g = torch.Generator().manual_seed(2)
    caches = [torch.randn(40, 2, 12, generator=g).to(DEVICE, E4M3) for _ in range(3)]
    want = [cache.clone() for cache in caches]
    moves = [(1, 5, 3), (0, 7, 4), (8, 2, 1)]
    copy_blocks(caches, moves, 4)
    poison_blocks(caches, [3], 4)
    reference.copy_blocks(want, moves, 4)
    for got, cache in zip(caches, want):
        cache[12:16] = torch.nan
        assert torch.equal(got.view(torch.uint8), cache.view(torch.uint8))
