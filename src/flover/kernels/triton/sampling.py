"""Sampling on a GPU: one fused draw of a token per row; rarer steps are the twin's (kernels/reference/sampling.py).

This is the host side; the kernels, and what their tokens depend on, are in sampling_kernels.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flover.kernels.triton.common import launch_options
from flover.kernels.triton.sampling_kernels import (
    GROUP,
    _bound,
    _collect,
    _gumbel,
    _merge,
    _peaks,
    _select,
    _tile_best,
)

TILE = 2048  # ids of one program
BLOCK = 2048  # candidates that a row's program looks at together


def draw(
    scores: Tensor,
    *,
    temperature: Tensor,
    random: Tensor | None,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    max_top_k: int = 0,
    open_top_p: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw a token per row: temperature, filters and noise as in the twin. Waits for nothing.

    Args:
        scores: [rows, vocab], fp32, fp16 or bf16, computed with in fp32; not written to.
        temperature: [rows] fp32 or fp64; not used in greedy rows.
        random: [rows] fp32 or fp64, 0 where the row is greedy; None: all are, and the parameters are not looked at.
        seeds, choices, positions: [rows] int64, see `gumbel`.
        top_k, top_p, min_p: see `filter_logits`; [rows] int64, fp64 and fp64 (or fp32), None if no row needs it.
        max_top_k, open_top_p: help the twin, see `filter_logits`; not used.

    Returns:
        (token ids [rows] int64, finite [rows] bool), see `sample_tokens`.
    """
    rows, vocab = scores.shape
    device = scores.device
    assert scores.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert scores.stride(1) == 1
    given = (temperature, random, seeds, choices, positions, top_k, top_p, min_p)
    assert all(t is None or (t.shape == (rows,) and t.is_contiguous()) for t in given)
    if random is None or (top_k is None and top_p is None and min_p is None):
        whole = draw_part(
            scores, 0, temperature=temperature, random=random, seeds=seeds, choices=choices, positions=positions
        )
        return best_of_parts(whole[None])
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    options = launch_options(device)
    tiles = triton.cdiv(vocab, TILE)
    source = (scores, scores.stride(0), temperature, random)
    noise = (seeds, choices, positions)
    groups = triton.cdiv(vocab, GROUP.value)
    peaks = torch.empty(rows, groups, dtype=torch.int32, device=device)
    limits = torch.empty(rows, 3, device=device)
    tally = torch.empty(rows, 2, dtype=torch.int64, device=device)
    keys, ids = torch.empty(2, rows, vocab, dtype=torch.int32, device=device)
    _peaks[(tiles, rows)](*source, peaks, groups, vocab, TILE=TILE, **options)
    _bound[(rows,)](
        peaks, random, top_k, top_p, min_p, limits, tally, groups, vocab, BLOCK=BLOCK, num_warps=8, **options
    )
    _collect[(tiles, rows)](*source, top_p, limits, tally, keys, ids, vocab, TILE=TILE, **options)
    _select[(rows,)](
        random, *noise, top_k, top_p, limits, tally, keys, ids, tokens, finite, vocab,
        BLOCK=BLOCK, num_warps=8, **options,
    )  # fmt: skip
    return tokens, finite


def draw_part(
    scores: Tensor,
    first: int,
    *,
    temperature: Tensor,
    random: Tensor | None,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
) -> Tensor:
    """As the twin: the candidates of a part of the vocabulary, here one of each tile."""
    rows, vocab = scores.shape
    tiles = triton.cdiv(vocab, TILE)
    out = torch.empty(2, rows, tiles, device=scores.device)
    _tile_best[(tiles, rows)](
        scores, scores.stride(0), temperature, random, seeds, choices, positions, out, vocab, first,
        TILE=TILE, **launch_options(scores.device),
    )  # fmt: skip
    return out


def best_of_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """As the twin: tokens and whether they are finite, of the candidates of all ranks `[ranks, 2, rows, tiles]`."""
    ranks, _, rows, tiles = parts.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=parts.device)
    finite = torch.empty(rows, dtype=torch.bool, device=parts.device)
    width = triton.next_power_of_2(ranks * tiles)
    options = launch_options(parts.device)
    _merge[(rows,)](parts, tokens, finite, ranks, rows, tiles, CANDIDATES=width, num_warps=1, **options)
    return tokens, finite


def gumbel(vocab_size: int, seeds: Tensor, choices: Tensor, positions: Tensor, purpose: int = 0) -> Tensor:
    """Gumbel noise [rows, vocab_size], fp32: the twin's to the last few bits."""
    out = torch.empty(seeds.shape[0], vocab_size, device=seeds.device)
    grid = (triton.cdiv(vocab_size, TILE), seeds.shape[0])
    _gumbel[grid](seeds, choices, positions, purpose, out, vocab_size, TILE=TILE, **launch_options(seeds.device))
    return out
