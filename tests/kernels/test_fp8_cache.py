"""The twins with an fp8 cache, against plain Python over the values that the cache is said to hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flover.kernels import reference
from flover.kernels.reference.attention import AttentionMetadata
from flover.kernels.reference.kv_cache import copy_blocks, poison_blocks, store_kv

E4M3 = torch.float8_e4m3fn
# every finite value of e4m3fn: 2^-9 steps below 2^-6, then 8 steps an octave up to 448
GRID = sorted({m * 2.0**-9 for m in range(8)} | {(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)})[:-1]


def nearest(x: float) -> float:
    """Round to nearest, ties to the even mantissa, which is every second of GRID; saturating."""
    if math.isnan(x):
        return x
    size = min(abs(x), 448.0)
    best = min(range(len(GRID)), key=lambda i: (abs(GRID[i] - size), i % 2))
    return math.copysign(GRID[best], x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stored_values_are_the_nearest_and_saturate(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.randn(90, generator=g) * 10.0 ** torch.randint(-3, 3, (90,), generator=g), torch.zeros(10)]
    )
    values[-8:] = torch.tensor([449.0, -464.0, 6e4, -6e4, math.inf, -math.inf, math.nan, 0.0])
    new = values.to(dtype).view(10, 2, 5)
    k_cache, v_cache = (torch.zeros(20, 2, 5, dtype=E4M3) for _ in "kv")
    slots = torch.randperm(20, generator=g)[:10]
    store_kv(new, -new, k_cache, v_cache, slots)
    want = torch.tensor([nearest(x) for x in new.flatten().tolist()]).view(10, 2, 5)
    assert torch.equal(k_cache.float()[slots].nan_to_num(7.5), want.nan_to_num(7.5))
    assert torch.equal(v_cache.float()[slots].nan_to_num(7.5), (-want).nan_to_num(7.5))
    rest = [i for i in range(20) if i not in slots.tolist()]
    assert (k_cache.float()[rest] == 0).all()


def test_copies_and_poison_are_of_bytes() -> None:
    cache = torch.arange(24).float().clamp(max=16).to(E4M3).view(24, 1, 1)
    before = cache.float().flatten()
    copy_blocks([cache], [(0, 2, 3)], 4)
    poison_blocks([cache], [1, 5], 4)
    after = cache.float().flatten()
    assert torch.equal(after[8:11], before[:3])
    assert after[4:8].isnan().all()
    assert after[20:].isnan().all()
    untouched = [*range(4), *range(11, 20)]
    assert torch.equal(after[untouched], before[untouched])


def brute(q: Tensor, k: Tensor, v: Tensor, slots: list[int], scale: float) -> Tensor:
    """One query `[heads, d]` over the cache's own values."""
    group = q.shape[0] // k.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        keys, values = k[slots, head // group], v[slots, head // group]
        weights = [math.exp(scale * float(q[head] @ key)) for key in keys]
        out[head] = sum(w * value for w, value in zip(weights, values)) / sum(weights)
    return out


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_attention_reads_what_the_cache_holds(contiguous: bool, invariant: bool) -> None:
    g = torch.Generator().manual_seed(1)
    size, lens, q_lens = (32 if contiguous else 4), [13, 21, 1], [1, 5, 1]
    per_row = 32 // size
    k_cache, v_cache = (torch.full((3 * 32, 2, 6), math.nan).to(E4M3) for _ in "kv")
    table = torch.randperm(3 * per_row, generator=g).view(3, per_row)
    slots = [[int(table[r, t // size]) * size + t % size for t in range(n)] for r, n in enumerate(lens)]
    for mine in slots:
        k, v = (torch.randn(2, len(mine), 2, 6, generator=g, dtype=torch.float64) * 2).unbind()
        store_kv(k, v, k_cache, v_cache, torch.tensor(mine))
    q = torch.randn(sum(q_lens), 4, 6, generator=g, dtype=torch.float64)
    blocks = [table[r][: -(-n // size)] for r, n in enumerate(lens)]
    meta = AttentionMetadata([0, 1, 6, 7], lens, blocks, size, contiguous)
    new = torch.tensor([slot for mine, m in zip(slots, q_lens) for slot in mine[-m:]])  # stored once more
    k, v = k_cache.double()[new], v_cache.double()[new]
    got = reference.attention(q, k, v, k_cache, v_cache, new, meta, scale=0.4, batch_invariant=invariant)
    assert got.dtype == q.dtype
    at = 0
    for mine, n, m in zip(slots, lens, q_lens):
        for i in range(m):
            want = brute(q[at], k_cache.double(), v_cache.double(), mine[: n - m + i + 1], 0.4)
            assert torch.allclose(got[at], want, atol=1e-12), at
            at += 1
