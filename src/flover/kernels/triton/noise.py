"""Gumbel noise from the twin's random bits: Philox4x32-10 of (seed, choice) at (id // 4, position, purpose)."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-24)


@triton.jit
def _philox(group, seed, choice, position, purpose):
    """The four words of each group of four ids."""
    return tl.philox_impl(
        group.to(tl.uint32),
        position.to(tl.uint32),
        tl.full(group.shape, purpose, tl.uint32),
        (seed >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        choice.to(tl.uint32),
    )


@triton.jit
def _gumbel_of(word):
    """-log(-log u), u = (m + 0.5) 2^-24. What m + 0.5 loses to rounding for m >= 2^23 is added to the inner log.

    That is log1p(lost / u) to 2^-24 of the whole, as lost / u is either tiny or u is almost 1.
    """
    m = (word >> 8).to(tl.float32)
    rounded = m + 0.5
    lost = (m - rounded) + 0.5  # exact
    return -tl.log(-(tl.log(rounded * UNIT) + lost * UNIT))


@triton.jit
def _tile_noise(start, seed, choice, position, purpose, TILE: tl.constexpr):
    """[TILE] of ids from `start` on, which is a multiple of four."""
    w0, w1, w2, w3 = _philox(start // 4 + tl.arange(0, TILE // 4), seed, choice, position, purpose)
    return _gumbel_of(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def _noise(ids, seed, choice, position):
    """The same numbers for any ids."""
    w0, w1, w2, w3 = _philox(ids >> 2, seed, choice, position, 0)
    return _gumbel_of(tl.where(ids & 2 == 0, tl.where(ids & 1 == 0, w0, w1), tl.where(ids & 1 == 0, w2, w3)))
