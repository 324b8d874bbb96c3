"""What test_triton_attention.py leaves open: masked tiles, padding tiles, more shapes and layouts, far offsets.

Its `Batch` builds the layouts and fills every slot that no live token owns with NaN; the twin in float64 is the truth.
"""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_triton_attention import TOLERANCE, Batch, check
from triton_device import DEVICE

from flover.kernels.triton.attention import INVARIANT_TILE, attention, invariant_tiles, prefill_tiles

GPU = DEVICE.type == "cuda"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 1, 80), (16, 1, 96), (2, 1, 256)], ids=["3x80", "16x96", "2x256"]
)
def test_prefill_shapes(heads, kv_heads, head_dim, dtype):
    check(Batch([5, 40], [70, 40], heads, kv_heads, head_dim, dtype), dtype, scale=head_dim**-0.5)


@pytest.mark.parametrize("block_size", [1, 8, 24, 96])
def test_block_sizes_in_a_mixed_batch(block_size, dtype):
    batch = Batch([1, 1, 6], [95, 25, 100], 4, 2, 16, dtype, block_size=block_size)
    check(batch, dtype, num_decode=2, scale=0.3)


def test_a_slab_in_a_mixed_batch(dtype):
    batch = Batch([1, 1, 6, 140], [95, 200, 100, 150], 4, 2, 16, dtype, block_size=256)
    assert batch.meta().contiguous
    check(batch, dtype, num_decode=2, scale=0.3)


def test_queries_that_see_nothing_of_the_first_tiles_of_keys(dtype):
    """The last queries of a tile have a window that begins tiles after that of the first."""
    check(Batch([150], [170], 2, 1, 16, dtype), dtype, scale=0.3, window=5)


@pytest.mark.parametrize("window", [None, 33, 200])
def test_tiles_of_keys_that_every_query_sees(window, dtype):
    """Before the diagonal, and between the window's far edge and it, nothing is masked; chunks begin in mid-tile."""
    check(Batch([150, 70], [411, 320], 2, 1, 16, dtype), dtype, scale=0.3, window=window)


def test_a_half_precision_slope_is_multiplied_in_fp32():
    """0.9 x 300 in fp16 is off by up to 0.125."""
    batch = Batch([1, 3], [300, 250], 4, 2, 16, torch.float16)
    slopes = torch.tensor([0.3, 0.7, 0.11, 0.9], device=DEVICE).half()
    check(batch, torch.float16, num_decode=1, scale=0.3, alibi=slopes)


@pytest.mark.parametrize("heads", [3, 16])
def test_only_real_heads_are_merged(heads, monkeypatch):
    """Groups that are padded to 16 and one that is not, in 4 splits of which 1, 3 and all are used."""
    batch, guarded = Batch([1, 1, 1], [64, 130, 700], heads, 1, 20, torch.float32), []

    def empty(*shape, **options):
        size = math.prod(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((size + 512,), 7.0, **options)
        guarded.append(memory[size:])
        return memory[:size].view(*shape)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(sys.modules[attention.__module__], "PROGRAMS", 12)
    check(batch, torch.float32, num_decode=3, scale=0.3)
    assert len(guarded) == 3
    assert all((guard == 7.0).all() for guard in guarded)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 193])
@pytest.mark.parametrize("window", [None, 64, 100])
def test_lengths_about_the_edges_of_splits(length, window):
    batch = Batch([1, 1], [length, 2 * length + 1], 2, 1, 16, torch.float32)
    check(batch, torch.float32, num_decode=2, scale=0.3, window=window)


def test_scores_far_apart(dtype):
    """Maxima that differ by more than exp2 spans: neither the online softmax nor the merge overflows."""
    batch = Batch([1, 1, 20], [300, 64, 90], 4, 2, 16, dtype)
    batch.k[:: batch.block_size] *= 20
    check(batch, dtype, num_decode=2, scale=0.5)


def test_keys_that_left_the_window_are_not_read(dtype):
    batch = Batch([1, 10], [300, 300], 4, 2, 16, dtype)
    size, window = batch.block_size, 20
    for entry, first in enumerate([300 - window, 256]):  # decode begins at the key, prefill at the tile of 64 or 32
        slots = batch.table[batch.rows[entry]][torch.arange(first) // size] * size + torch.arange(first) % size
        batch.k[slots] = batch.v[slots] = torch.nan
    check(batch, dtype, num_decode=1, scale=0.3, window=window)


def test_padding_tiles_compute_nothing(dtype, monkeypatch):
    """Before entry 0 another lies in memory: a kernel that took tile_entry -1 for one would write its output."""
    batch = Batch([3, 20, 5], [30, 20, 40], 4, 2, 16, dtype)
    entry, start = prefill_tiles(batch.q_lens[1:], 0, batch.meta().tile_queries)
    pad = np.full(2, -1, dtype=np.int32)
    meta = batch.meta(0, (np.concatenate([pad, entry, pad]), np.concatenate([pad * 0, start, pad * 0])))
    meta.rows, meta.seq_lens, meta.query_start = meta.rows[1:], meta.seq_lens[1:], meta.query_start[1:]
    _, want = batch.expected(scale=0.3)
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, 7.0, **options))
    got = batch.attend(meta, scale=0.3)
    assert (got[:3] == 7.0).all()
    assert (got[3:].double() - want[3:]).abs().max() < TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("options", [{"window": 21}, {"softcap": 3.0}, {"alibi": True}], ids=str)
def test_invariant_mode_with_options_over_chunks_and_neighbours(options, dtype):
    """Bits of one prompt: in one piece beside another, then in pieces, at last token by token."""
    if "alibi" in options:
        options = {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.02], device=DEVICE)}
    whole = Batch([30, 100], [30, 100], 4, 2, 16, dtype)
    options = {"scale": 0.25, "batch_invariant": True, **options}
    together = whole.attend(whole.meta(0, invariant_tiles([30, 100], [30, 100])), **options)
    keep, want = whole.expected(**{k: v for k, v in options.items() if k != "batch_invariant"})
    assert (together[keep].double() - want).abs().max() < TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    q, rows = whole.q, whole.rows
    edges = [0, 43, 80, 97, 98, 99, 100]
    for begin, end in pairwise(edges):
        whole.q, whole.rows, whole.seq_lens, whole.q_lens = q[30 + begin : 30 + end], rows[1:], [end], [end - begin]
        whole.starts = np.array([0, end - begin])
        meta = whole.meta(0, invariant_tiles([end - begin], [end]))
        part = whole.attend(meta, **options)
        assert torch.equal(part, together[30 + begin : 30 + end]), (begin, end)


@pytest.mark.parametrize("queries", [16, 128])
def test_prefill_tiles_cover_each_query_once_and_begin_with_the_longest(queries):
    q_lens = [1, queries, queries + 1, 0, 5 * queries - 1]
    entry, start = prefill_tiles(q_lens, 7, queries)
    assert entry.dtype == start.dtype == np.int32
    assert list(start) == sorted(start, reverse=True)
    for i, n in enumerate(q_lens):
        assert sorted(start[entry == 7 + i]) == list(range(0, n, queries))
    assert [len(part) for part in prefill_tiles([], 3, queries)] == [0, 0]


def test_invariant_tiles_lie_on_absolute_positions():
    q_lens, seq_lens = [1, 40, 17, 1], [33, 40, 100, 16]
    entry, start = invariant_tiles(q_lens, seq_lens)
    for i, (n, length) in enumerate(zip(q_lens, seq_lens, strict=True)):
        position = start[entry == i] + length - n
        assert (position % INVARIANT_TILE == 0).all()
        covered = np.concatenate([np.arange(p, p + INVARIANT_TILE) for p in position])
        assert set(range(length - n, length)) <= set(covered.tolist())
        assert len(covered) == len(set(covered.tolist()))


@pytest.mark.parametrize("slab", [False, True])
def test_a_cache_of_over_two_billion_elements(slab):
    """The same blocks past element 2^31, on a GPU; elsewhere a little further on, so that the test itself is run."""
    heads, kv_heads, head_dim = (16, 8, 128) if GPU else (4, 2, 16)
    batch = Batch([1, 1, 30], [260, 9, 60], heads, kv_heads, head_dim, torch.float16, block_size=512 if slab else 16)
    meta = batch.meta(2)
    near = batch.attend(meta, scale=0.1)
    per_block = batch.k[0].numel() * batch.block_size
    skipped = (2**31 // per_block + 1) if GPU else 3
    caches = []
    for cache in (batch.k, batch.v):
        far = torch.empty(skipped * batch.block_size + len(cache), *cache.shape[1:], dtype=cache.dtype, device=DEVICE)
        far[-len(cache) :] = cache
        caches.append(far)
    assert not near.isnan().any()
    batch.k, batch.v = caches
    batch.table += skipped
    assert torch.equal(batch.attend(batch.meta(2), scale=0.1), near)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (16, 16, 256), (25, 25, 64)])
def test_a_replayed_graph_of_split_decode_is_the_same_to_the_bit(heads, kv_heads, head_dim, dtype):
    """The merge runs in split order whoever comes last, and the counters are zero again after every replay."""
    batch = Batch([1] * 2, [2000, 700], heads, kv_heads, head_dim, dtype)
    meta = batch.meta(2)
    new = batch.new()
    eager = batch.attend(meta, new, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batch.attend(meta, new, scale=0.1)
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, eager)
