"""The device side of sampling: one fused draw of a token per row. Launches: kernels/triton/sampling.py.

Invariant: a token depends on its row's scores and parameters only, never on tiling, other rows or what those need.
Random bits are the twin's, and maxima are exact, counts and fixed-point masses integers, so that atomics may add in any
order. Only the last bits of exp and log may differ from the twin's: another token is drawn where the two best noisy
scores are that close, or (very rarely) where a top-p set ends that close to its share.

No row is sorted. Scores below a bound that provably cannot matter are left out, after which few of a model's logits
remain; the thresholds are then searched among those (threshold.py; noise is in noise.py). The launches, the same for
any number of rows:

    no filter  _tile_best (tiles, rows) -> _merge (rows): one read of the scores
    filters    _peaks (tiles, rows) -> _bound (rows) -> _collect (tiles, rows) -> _select (rows): two reads
"""

from __future__ import annotations

import triton
import triton.language as tl

from flover.kernels.triton.common import grid_launch, grid_wait
from flover.kernels.triton.noise import _noise, _tile_noise
from flover.kernels.triton.threshold import LOWEST, _key, _mass, _score, _search

GROUP = tl.constexpr(32)  # ids that share a peak
# How far below the best score one can matter: noise spans -2.9 to 17.4; exp(-28) is no mass in fixed point.
NOISE_SPAN = tl.constexpr(21.0)
MASS_SPAN = tl.constexpr(28.0)
# Rows of one tensor `[parameters, rows]`: their alignment changes with the number of rows. Each is read as a scalar.
ROW_PARAMETERS = ("temperature", "random", "seeds", "choices", "positions", "top_k", "top_p", "min_p")


@triton.jit
def _load_scores(scores, stride, row, ids, vocab):
    """fp32, -inf outside the vocabulary. A NaN counts as +inf: either makes a row not finite."""
    x = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _over_temperature(x, temperature, random, row):
    """Divided as the twin does; not if the row is greedy."""
    divisor = tl.where(tl.load(random + row) != 0, tl.load(temperature + row).to(tl.float32), 1.0)
    return tl.div_rn(x, divisor)


@triton.jit
def _first_best(x, ids):
    """The best score and its lowest id; ids in any order."""
    best = tl.max(x, 0)
    return best, tl.min(tl.where(x == best, ids, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _tile_best(
    scores,  # [rows, vocab]
    stride,
    temperature,
    random,
    seeds,
    choices,
    positions,
    part,  # [2, rows, tiles] fp32: the best scores, and their ids as numbers
    vocab,  # the scores' ids begin at first
    first,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    x = _load_scores(scores, stride, row, ids, vocab)
    if random is not None:  # known to the compiler
        x = _over_temperature(x, temperature, random, row)
        if tl.load(random + row) != 0:
            seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
            x += _tile_noise(first + tile * TILE, seed, choice, position, 0, TILE)
    value, winner = _first_best(x, first + ids)
    at = row * tl.num_programs(0) + tile
    tl.store(part + at, value)
    tl.store(part + at + tl.num_programs(0) * tl.num_programs(1), winner)


@triton.jit(do_not_specialize=("ranks", "rows"))
def _merge(parts, tokens, finite, ranks, rows, tiles, CANDIDATES: tl.constexpr, PDL: tl.constexpr):
    """Of parts `[ranks, 2, rows, tiles]`: what `_tile_best` found on each rank."""
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0)
    i = tl.arange(0, CANDIDATES)
    inside = i < ranks * tiles
    at = i // tiles * (2 * rows * tiles) + row * tiles + i % tiles
    x = tl.load(parts + at, mask=inside, other=float("-inf"))
    ids = tl.load(parts + at + rows * tiles, mask=inside, other=2147483520.0).to(tl.int32)  # the largest that fp32 has
    value, winner = _first_best(x, ids)
    good = (value > float("-inf")) & (value < float("inf"))
    tl.store(tokens + row, tl.where(good, winner, 0).to(tl.int64))
    tl.store(finite + row, good)


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _peaks(
    scores,
    stride,
    temperature,
    random,
    peaks,  # [rows, groups] int32, the best key of each GROUP of ids
    groups,
    vocab,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.max(_load_scores(scores, stride, row, ids, vocab), 1)  # division keeps the order
    tl.store(peaks + row * groups + group, _key(_over_temperature(x, temperature, random, row)), mask=group < groups)


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _bound(
    peaks,
    random,
    top_k,
    top_p,
    min_p,
    limits,  # [rows, 3] fp32: the best score; the lowest that counts as mass; the lowest that can matter
    tally,  # [rows, 2] int64, cleared for _collect
    groups,
    vocab,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    peaks += row * groups
    highest = tl.full([BLOCK], LOWEST, tl.int32)
    for start in range(0, groups, BLOCK):
        at = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(peaks + at, mask=at < groups, other=LOWEST))
    high = tl.max(highest, 0)
    best = _score(high)
    is_random = tl.load(random + row) != 0
    k = 0
    if top_k is not None:
        k = tl.load(top_k + row)
    floor = float("-inf")
    if min_p is not None:
        floor = best + tl.log(tl.load(min_p + row)).to(tl.float32)
    span = NOISE_SPAN
    if top_p is not None:
        rest = (1 - tl.load(top_p + row).to(tl.float64)).to(tl.float32)
        # Scores so low that all `vocab` together have less mass than top-p leaves out.
        open_span = tl.minimum(tl.log(vocab / tl.maximum(rest, 1e-30)) + 0.01, MASS_SPAN)
        span = tl.where(rest > 0, tl.where(k > 0, MASS_SPAN, open_span), NOISE_SPAN)
    bound = tl.maximum(floor, best - span)
    if top_k is not None:
        low = _key(bound).to(tl.int64)
        high = tl.where(is_random & (k > 0), high.to(tl.int64), low)
        # If k groups have a peak of at least t, then at least k scores are.
        bound = _score(_search(peaks, groups, low, high, k.to(tl.float64), best, False, BLOCK).to(tl.int32))
        floor = tl.where(k > 0, bound, floor)
    bound = tl.where(is_random, bound, best)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(limits + row * 3, best)
    tl.store(limits + row * 3 + 1, floor)
    tl.store(limits + row * 3 + 2, tl.where(finite, bound, float("inf")))
    tl.store(tally + row * 2 + tl.arange(0, 2), tl.full([2], 0, tl.int64))


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _collect(
    scores,
    stride,
    temperature,
    random,
    top_p,
    limits,
    tally,  # [rows, 2] int64: the number of candidates; the mass between the two lower limits
    keys,  # [rows, vocab] int32, of the candidates, in no order between tiles
    ids,  # [rows, vocab] int32
    vocab,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = _over_temperature(_load_scores(scores, stride, row, i, vocab), temperature, random, row)
    bound = tl.load(limits + row * 3 + 2)  # above -inf, and so above what is outside the vocabulary
    chosen = x >= bound
    count = tl.cumsum(chosen.to(tl.int32), 0)
    first = tl.atomic_add(tally + row * 2, tl.max(count, 0).to(tl.int64), sem="relaxed")
    at = row * vocab + first + count - 1
    tl.store(keys + at, _key(x), mask=chosen)
    tl.store(ids + at, i, mask=chosen)
    if top_p is not None:
        below = (x >= tl.load(limits + row * 3 + 1)) & (x < bound)
        mass = tl.where(below, _mass(x, tl.load(limits + row * 3)), 0)
        tl.atomic_add(tally + row * 2 + 1, tl.sum(mass, 0), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _select(
    random,
    seeds,
    choices,
    positions,
    top_k,
    top_p,
    limits,
    tally,
    keys,
    ids,
    tokens,
    finite,
    vocab,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    keys += row * vocab
    ids += row * vocab
    n = tl.load(tally + row * 2).to(tl.int32)
    best = tl.load(limits + row * 3)
    high = _key(best).to(tl.int64)
    floor = _key(tl.load(limits + row * 3 + 2)).to(tl.int64)  # of a greedy row it is `high`: nothing to search
    if top_k is not None:
        k = tl.load(top_k + row)
        floor = _search(keys, n, floor, tl.where(k > 0, high, floor), k.to(tl.float64), best, False, BLOCK)
    if top_p is not None:
        mass = tl.full([BLOCK], 0, tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < n, other=LOWEST)
            mass += tl.where(key >= floor, _mass(_score(key), best), 0)
        share = tl.load(top_p + row).to(tl.float64)
        target = (tl.load(tally + row * 2 + 1) + tl.sum(mass, 0)).to(tl.float64) * share
        floor = _search(keys, n, floor, tl.where(share < 1, high, floor), target, best, True, BLOCK)
    is_random = tl.load(random + row) != 0
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < n, other=LOWEST)
        i = tl.load(ids + at, mask=at < n, other=0x7FFFFFFF)
        x = tl.where(key >= floor, _score(key), float("-inf"))
        x = tl.where(is_random, x + _noise(i, seed, choice, position), x)
        better = (x > value) | ((x == value) & (i < winner))
        value, winner = tl.where(better, x, value), tl.where(better, i, winner)
    value_best, token = _first_best(value, winner)
    good = (value_best > float("-inf")) & (best < float("inf"))
    tl.store(tokens + row, tl.where(good, token, 0).to(tl.int64))
    tl.store(finite + row, good)


@triton.jit(do_not_specialize_on_alignment=ROW_PARAMETERS)
def _gumbel(seeds, choices, positions, purpose, out, vocab, TILE: tl.constexpr, PDL: tl.constexpr):
    grid_launch(PDL)
    grid_wait(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    noise = _tile_noise(tile * TILE, seed, choice, position, purpose, TILE)
    tl.store(out + row * vocab + ids, noise, mask=ids < vocab)
