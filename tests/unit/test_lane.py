"""What a lane stages, of real steps in captured shapes and without: each row finds its own, all that pads is empty."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.engine.lane import Lane
from flover.engine.runner import Batch
from flover.parallel import ALONE

MAX_ROWS, MAX_TOKENS = 40, 2000
COUNT = st.just(1) | st.integers(1, 3) | st.integers(1, 300)
COUNTS = st.lists(COUNT, min_size=1, max_size=MAX_ROWS).filter(lambda counts: sum(counts) <= MAX_TOKENS)


def lane(kv_heads: int, batch_invariant: bool) -> Lane:
    """On the CPU, of a runner that has nothing but shapes."""
    runner: Any = SimpleNamespace(
        sampler=None, batch_invariant=batch_invariant, max_rows=MAX_ROWS, heads=(2 * kv_heads, kv_heads), group=ALONE
    )
    runner.tables, runner.prompt = np.zeros((MAX_ROWS, 2)), np.arange(MAX_ROWS)
    runner.device = torch.device("cpu")
    zeros, event = torch.zeros, SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options))
        patch.setattr(torch.cuda, "Event", lambda: event)
        patch.setattr(torch.cuda, "Stream", lambda: None)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        return Lane(runner, MAX_TOKENS, 8, torch.float32)


LANES = [lane(kv_heads, invariant) for kv_heads, invariant in [(1, False), (8, False), (71, False), (1, True)]]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LANES), COUNTS, st.data())
def test_every_row_finds_its_own(lane: Lane, counts: list[int], data: st.DataObject) -> None:
    n = len(counts)
    starts = data.draw(st.lists(st.integers(0, 400) | st.integers(0, 60_000), min_size=n, max_size=n))
    rows = np.array(data.draw(st.permutations(range(MAX_ROWS)))[:n])
    given = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) | (np.array(counts) > 1)
    prompts = [[1000 * row + i for i in range(count)] for row, count in zip(rows.tolist(), counts)]
    ids = np.array([i for prompt, g in zip(prompts, given) if g for i in prompt], dtype=np.int32)
    nothing = np.zeros(n, dtype=bool)
    batch = Batch(rows, np.array(counts), np.array(starts), nothing, given, ~nothing, ids)
    staged = lane.stage(batch, [], capture=data.draw(st.booleans()))
    v: Any = {name: part.tolist() for name, part in lane._views(staged.shape).items()}
    entries, begins, (keys,) = staged.entries.tolist(), staged.begins.tolist(), v["share_keys"]
    shares, tiles = list(zip(v["share_entry"], v["share_number"])), list(zip(v["tile_entry"], v["tile_start"]))
    for i, (entry, begin, row, count, start) in enumerate(zip(entries, begins, rows.tolist(), counts, starts)):
        here, length = slice(begin, begin + count), start + count
        assert v["positions"][here] == list(range(start, length))
        assert v["token_rows"][here] == [row] * count
        assert v["ids"][here] == (prompts[i] if given[i] else [-1])
        assert (v["entry_rows"][entry], v["seq_lens"][entry]) == (row, length)
        assert (v["sample_index"][entry], v["sample_rows"][entry]) == (begin + count - 1, row)
        assert v["query_start"][entry : entry + 2] == [begin, begin + count]
        mine = [number for e, number in shares if e == entry]
        assert (entry < staged.shape.decode) == (count == 1)
        if count == 1 and not lane.batch_invariant:
            assert mine == list(range(-(-length // keys)))
        else:
            mine = sorted(first for e, first in tiles if e == entry)
            assert mine[0] <= 0
            assert mine[-1] < count <= mine[-1] + lane.tile_queries
            assert all(b - a == lane.tile_queries for a, b in pairwise(mine))
    assert {e for e, _ in [*shares, *tiles]} <= {*entries, -1}
    for entry in set(range(staged.shape.entries)) - set(entries):
        assert (v["seq_lens"][entry], v["sample_rows"][entry]) == (0, MAX_ROWS)
        assert v["query_start"][entry] == v["query_start"][entry + 1]
