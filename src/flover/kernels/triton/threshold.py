"""The search for a threshold among a row's scores: in the order-preserving integer image of fp32, by several pivots."""

from __future__ import annotations

import triton
import triton.language as tl

from flover.kernels.reference.sampling import MASS_ONE

PIVOTS = tl.constexpr(4)  # a search splits its interval in PIVOTS + 1 parts
ONE = tl.constexpr(MASS_ONE)
LOWEST = tl.constexpr(-2139095041)  # _key(-inf)


@triton.jit
def _key(x):
    """fp32, not NaN, -> int32 of the same order; equal zeros get equal keys."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, best):
    """Probability relative to the best score's, in the twin's fixed point."""
    return (tl.exp(x - best) * ONE).to(tl.int64)


@triton.jit
def _search(keys, n, low, high, target, best, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t in [low, high] for which the keys >= t number `target`, or have that mass; low if none.

    low, high: int64 scalars. target: fp64, which holds every count and mass below 2^53 exactly.
    """
    while low < high:
        step = (high - low + 1 + PIVOTS) // (PIVOTS + 1)  # of high - low + 1 keys, rounded up
        pivots = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS)), high)
        reached = tl.full([PIVOTS], 0, tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < n, other=LOWEST)  # below every pivot
            above = key[:, None] >= pivots[None, :]
            if MASS:
                reached += tl.sum(tl.where(above, _mass(_score(key), best)[:, None], 0), 0)
            else:
                reached += tl.sum(above.to(tl.int32), 0)
        passed = tl.sum((reached.to(tl.float64) >= target).to(tl.int64), 0)  # the lowest so many pivots
        high = tl.minimum(low + step * (passed + 1) - 1, high)
        low = tl.minimum(low + step * passed, high)
    return low
