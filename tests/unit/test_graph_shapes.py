"""Shapes that CUDA graphs are captured for: each holds the step it is chosen for, and few serve all steps."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flover.engine.cuda_graph import MIXED_ROWS, ROWS, TOKENS, Shape, StepGraphs, decode_shape, mixed_shape
from flover.engine.staging import sections
from flover.kernels.triton.attention import MAX_SHARES, PROGRAMS, SHARE_UNIT, decode_shares, num_shares, prefill_tiles


@given(st.integers(1, 600), st.booleans())
def test_decode_shapes_hold_their_rows(rows: int, tiled: bool) -> None:
    shape = decode_shape(rows, tiled=tiled)
    assert (shape is None) == (rows > ROWS[-1])
    if shape is not None:
        assert shape.tokens == shape.decode == shape.entries >= rows
        assert shape.tiles == (shape.tokens if tiled else 0)
        assert shape.decode == 1 or decode_shape(shape.decode, tiled=tiled) == shape


@given(st.integers(1, 700), st.lists(st.integers(2, 900), min_size=1, max_size=80), st.data())
def test_mixed_shapes_hold_their_steps(max_rows: int, chunks: list[int], data: st.DataObject) -> None:
    decode = data.draw(st.integers(0, max_rows))
    queries = data.draw(st.sampled_from([16, 32, 64, 128]))
    step = Shape(decode + sum(chunks), decode, len(chunks), len(prefill_tiles(chunks, decode, queries)[0]))
    shape = mixed_shape(step, max_rows, queries)
    if shape is None:
        assert step.tokens > TOKENS[-1] or len(chunks) > 8 or decode > ROWS[-1]
        return
    assert all(mine >= wanted for mine, wanted in zip(shape, step))
    parts = list(sections(shape, num_shares(shape.decode, 8)).values())
    assert all(a.stop <= b.start and b.start % 4 == 0 for a, b in itertools.pairwise(parts))


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=300), st.sampled_from([1, 2, 8, 32, 71]))
def test_shares_are_the_keys_of_all_entries(lens: list[int], kv_heads: int) -> None:
    (keys,), entries, numbers = decode_shares(lens, kv_heads)
    room = num_shares(len(lens), kv_heads)
    assert keys in range(SHARE_UNIT, 1 << 20, SHARE_UNIT)
    assert len(entries) == len(numbers) <= room <= num_shares(len(lens) + 1, kv_heads)
    shares = list(zip(entries.tolist(), numbers.tolist()))
    longest_first = sorted(range(len(lens)), key=lambda entry: -lens[entry])
    assert shares == [(entry, number) for entry in longest_first for number in range(-(-lens[entry] // keys))]
    smaller = int(keys) - SHARE_UNIT
    if len(lens) * kv_heads < PROGRAMS:
        assert not smaller or sum(-(-n // smaller) for n in lens) > room
    elif max(lens) <= 1.25 * sum(lens) / len(lens):
        assert len(entries) == sum(n > 0 for n in lens)  # rows of much the same length stay whole
    else:
        assert numbers.max(initial=0) < MAX_SHARES


@pytest.mark.parametrize("max_rows", [1, 7, 32, 33, 100, 256, 600])
def test_what_is_captured_at_start(max_rows: int) -> None:
    """Every step of decode alone, and of one prefill beside as many rows as decode in MIXED_ROWS; each shape once."""
    graphs: Any = object.__new__(StepGraphs)
    graphs._steps = SimpleNamespace(max_rows=max_rows, batch_invariant=False, tile_queries=128)
    graphs._rows, graphs._max_tokens = range(2 * max_rows + 64), 2 * (2048 + max_rows)
    likely = list(graphs._likely())
    assert len(likely) == len(set(likely))
    rows = min(max_rows, MIXED_ROWS[-1])
    steps = [Shape(d + n, d, 1, 1) for d in range(1, rows + 1) for n in (1, 17, 100, 1000)]
    steps += [Shape(d, d, 0, 0) for d in range(1, min(max_rows, ROWS[-1]) + 1)]
    assert {graphs.fit(step) for step in steps} <= set(likely)


def test_few_shapes_serve_every_step() -> None:
    steps = [Shape(d + n, d, 1, -(-n // 128)) for d in range(0, 257, 3) for n in range(2, 1500, 7)]
    assert len({mixed_shape(step, 256, 128) for step in steps}) <= 3 * len(TOKENS)
