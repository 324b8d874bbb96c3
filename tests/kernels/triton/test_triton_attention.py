"""Decode, prefill and both together against the twin in float64, over shuffled blocks and slots full of stale NaN."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from triton_device import DEVICE

from flover.kernels import reference
from flover.kernels.reference.attention import AttentionMetadata
from flover.kernels.reference.attention import attention as twin
from flover.kernels.triton.attention import (
    DeviceMetadata,
    attention,
    decode_shares,
    invariant_tiles,
    num_shares,
    prefill_tiles,
    tile_queries,
)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Batch:
    """Entries with `q_lens` new tokens at the end of `seq_lens`; caches whose other slots are NaN."""

    def __init__(self, q_lens, seq_lens, heads, kv_heads, head_dim, dtype, block_size=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.q_lens, self.seq_lens, self.block_size = q_lens, seq_lens, block_size
        n = len(seq_lens)
        blocks = -(-max(seq_lens) // block_size)
        order = torch.randperm(n * blocks, generator=g).view(n, blocks)
        self.rows = torch.randperm(n + 2, generator=g)[:n]
        self.table = torch.zeros(n + 2, blocks, dtype=torch.int32)
        self.table[self.rows] = order.int()
        shape = (n * blocks * block_size, kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, torch.nan) for _ in "kv")
        for entry, length in enumerate(seq_lens):
            at = torch.arange(length)
            slots = self.table[self.rows[entry]][at // block_size] * block_size + at % block_size
            for cache in (self.k, self.v):
                cache[slots] = torch.randn(length, kv_heads, head_dim, generator=g)
        self.k, self.v = (t.to(DEVICE, dtype) for t in (self.k, self.v))
        width = (heads + 2 * kv_heads) * head_dim
        qkv = torch.randn(sum(q_lens), width, generator=g).to(DEVICE, dtype)
        self.q = qkv[:, : heads * head_dim].unflatten(-1, (heads, head_dim))  # a strided view
        self.starts = np.concatenate([[0], np.cumsum(q_lens)])

    def meta(self, num_decode=0, tiles=None, padding=0):
        """padding: so many of the decode entries, the last, are in the captured shape and not in the step."""
        queries = tile_queries(self.q.shape[1], self.k.shape[1])
        tile_entry, tile_start = tiles or prefill_tiles(self.q_lens[num_decode:], num_decode, queries)

        def on_device(values):
            return torch.as_tensor(np.asarray(values, dtype=np.int32), device=DEVICE)

        kv_heads = self.k.shape[1]
        lens = self.seq_lens[: num_decode - padding]
        share_keys, *shares = decode_shares(lens, kv_heads) if num_decode else ([0], [], [])
        room = num_shares(num_decode, kv_heads)
        entries, numbers = (np.append(s, np.full(room - len(s), fill)) for s, fill in zip(shares, (-1, 0)))

        return DeviceMetadata(
            block_table=self.table.to(DEVICE),
            rows=on_device(self.rows),
            seq_lens=on_device(self.seq_lens),
            query_start=on_device(self.starts),
            num_decode=num_decode,
            share_keys=on_device(share_keys),
            share_entry=on_device(entries),
            share_number=on_device(numbers),
            tile_entry=on_device(tile_entry) if len(tile_entry) else None,
            tile_start=on_device(tile_start) if len(tile_entry) else None,
            tile_queries=queries,
            block_size=self.block_size,
            contiguous=self.table.shape[1] == 1,
        )

    def slots(self):
        """Of the new tokens."""
        places = []
        for entry, (n, length) in enumerate(zip(self.q_lens, self.seq_lens, strict=True)):
            at = torch.arange(length - n, length).clamp(min=0)
            table = self.table[self.rows[entry]].long()
            found = table[at // self.block_size] * self.block_size + at % self.block_size
            places.append(found if length else torch.full_like(found, -1))
        return torch.cat(places).to(DEVICE)

    def new(self):
        """Keys, values and slots of the new tokens, as the cache has them."""
        slots = self.slots()
        return *(cache.float()[slots].to(self.q.dtype) for cache in (self.k, self.v)), slots

    def attend(self, meta, new=None, **options):
        """The kernels; what is new is stored once more."""
        k, v, slots = new or self.new()
        return attention(self.q, k, v, self.k, self.v, slots, meta, **options)

    def expected(self, **options):
        live = [i for i, n in enumerate(self.seq_lens) if n]
        blocks = [self.table[self.rows[i]][: -(-self.seq_lens[i] // self.block_size)].long().to(DEVICE) for i in live]
        meta = AttentionMetadata(
            query_start=[0, *np.cumsum([self.q_lens[i] for i in live]).tolist()],
            seq_lens=[self.seq_lens[i] for i in live],
            blocks=blocks,
            block_size=self.block_size,
            contiguous=False,
        )
        keep = torch.cat([torch.arange(a, b) for i, (a, b) in enumerate(pairwise(self.starts)) if i in live])
        if "alibi" in options:
            options["alibi"] = options["alibi"].double()
        return keep, twin(self.q[keep].double(), self.k.double(), self.v.double(), meta, **options)


def check(batch, dtype, num_decode=0, **options):
    got = batch.attend(batch.meta(num_decode), **options)
    keep, want = batch.expected(**options)
    assert got.dtype == dtype
    assert (got[keep].double() - want).abs().max() < TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 80), (4, 1, 96), (16, 1, 128), (2, 2, 256)]
)
def test_decode(heads, kv_heads, head_dim, dtype):
    batch = Batch([1] * 4, [1, 37, 300, 16], heads, kv_heads, head_dim, dtype)
    check(batch, dtype, num_decode=4, scale=head_dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 20), (2, 1, 128)])
def test_prefill_with_and_without_context(heads, kv_heads, head_dim, dtype):
    batch = Batch([20, 1, 140, 3], [20, 1, 150, 70], heads, kv_heads, head_dim, dtype)
    check(batch, dtype, scale=0.1)


@pytest.mark.parametrize("options", [{"window": 17}, {"window": 200}, {"softcap": 5.0}, {"alibi": True}], ids=str)
def test_options_in_a_mixed_batch(options, dtype):
    batch = Batch([1, 1, 1, 9, 33], [9, 260, 31, 40, 33], 4, 2, 32, dtype)
    if "alibi" in options:
        options = {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.02], device=DEVICE)}
    check(batch, dtype, num_decode=3, scale=0.2, **options)


def test_padding_entries_and_slab_rows(dtype):
    batch = Batch([1, 1, 1, 1], [0, 50, 0, 7], 4, 2, 16, dtype, block_size=64)
    assert batch.table.shape[1] == 1  # one block a row: addressed as a slab
    check(batch, dtype, num_decode=4, scale=0.3)


def test_the_counters_of_a_split_launch_are_back_at_zero(dtype):
    batch = Batch([1], [513], 2, 1, 16, dtype)
    first = batch.attend(batch.meta(1), scale=0.3)
    assert torch.equal(first, batch.attend(batch.meta(1), scale=0.3))
    check(batch, dtype, num_decode=1, scale=0.3)


def test_invariant_mode_is_bitwise_over_batches_and_chunks(dtype):
    whole = Batch([40, 25], [40, 25], 4, 2, 16, dtype)

    def run(q_lens, seq_lens, entries):
        part = Batch([40, 25], [40, 25], 4, 2, 16, dtype)
        part.q_lens, part.seq_lens = q_lens, seq_lens
        starts = [whole.starts[e] + n - m for e, n, m in zip(entries, seq_lens, q_lens, strict=True)]
        part.q = torch.cat([whole.q[s : s + m] for s, m in zip(starts, q_lens, strict=True)])
        part.rows, part.starts = whole.rows[list(entries)], np.concatenate([[0], np.cumsum(q_lens)])
        meta = part.meta(0, invariant_tiles(q_lens, seq_lens))
        part.k, part.v = whole.k, whole.v
        return part.attend(meta, scale=0.25, batch_invariant=True)

    together = run([40, 25], [40, 25], [0, 1])
    keep, want = whole.expected(scale=0.25)
    assert (together[keep].double() - want).abs().max() < TOLERANCE[dtype] * 2
    assert torch.equal(run([25], [25], [1]), together[40:])
    for cut in (1, 7, 16, 39):
        parts = torch.cat([run([cut], [cut], [0]), run([40 - cut], [40], [0])])
        assert torch.equal(parts, together[:40])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (16, 16, 256), (25, 25, 64), (32, 32, 128)])
def test_true_shapes_and_graph_replay(heads, kv_heads, head_dim, dtype):
    lens = [1, 700, 1024, 3000, 129, 64, 2000, 5]
    batch = Batch([1] * 8, lens, heads, kv_heads, head_dim, dtype)
    check(batch, dtype, num_decode=8, scale=head_dim**-0.5)
    prompts = Batch([300, 1000, 77], [300, 1100, 77], heads, kv_heads, head_dim, dtype)
    check(prompts, dtype, scale=head_dim**-0.5)
    meta, new = batch.meta(8), batch.new()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batch.attend(meta, new, scale=0.1)
    batch.seq_lens = [1, 1, 900, 2500, 100, 0, 17, 3]
    later = batch.meta(8)
    for name in ("seq_lens", "share_keys", "share_entry", "share_number"):
        getattr(meta, name).copy_(getattr(later, name))
    for static, values in zip(new, batch.new(), strict=True):
        static.copy_(values)
    graph.replay()
    keep, want = batch.expected(scale=0.1)
    assert (out[keep].double() - want).abs().max() < TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(("pairs", "interleaved"), [(0, False), (8, False), (12, True), (5, True)])
def test_new_tokens_are_rotated_stored_and_seen(pairs, interleaved, dtype):
    """Decode does it by itself, a prefill before it attends; a token without a slot sees itself and is not stored."""
    batch = Batch([1, 1, 1, 9, 40], [1, 70, 200, 30, 40], 4, 2, 24, dtype)
    n, slots = sum(batch.q_lens), batch.slots()
    g = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(n, 8, 24, generator=g).to(DEVICE, dtype).split([4, 2, 2], 1)
    angles = torch.randn(n, 1, pairs, generator=g).to(DEVICE)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype), interleaved) if pairs else None
    unstored = slots[1].item()
    for cache in (batch.k, batch.v):
        cache[slots] = torch.nan
    wide = [t.double() for t in (q, k, v, batch.k, batch.v)]
    turned = rotary and (rotary[0].double(), rotary[1].double(), interleaved)
    size = batch.block_size
    blocks = [batch.table[row][: -(-m // size)].long().to(DEVICE) for row, m in zip(batch.rows, batch.seq_lens)]
    meta = AttentionMetadata(batch.starts.tolist(), batch.seq_lens, blocks, size, False)
    want = reference.attention(*wide, slots, meta, rotary=turned, scale=0.2)
    slots[1] = -1
    got = attention(q, k, v, batch.k, batch.v, slots, batch.meta(3), rotary=rotary, scale=0.2)
    assert (got.double() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()
    for mine, theirs in zip((batch.k, batch.v), wide[3:], strict=True):
        assert mine[unstored].isnan().all()
        mine[unstored] = theirs[unstored].to(dtype)
        live = ~theirs.isnan()
        assert torch.equal(mine.isnan(), ~live)
        assert (mine.double() - theirs)[live].abs().max() < TOLERANCE[dtype] * 4
