"""Sampling in pure torch: the specification of the sampling kernels, and the CPU path.

Every function is one batched pass over rows with per-row parameters. Invariant: a row's bits depend on its
own logits and parameters only, not on the other rows, their order or their number. So no reduction depends on
how it is tiled: maxima are exact, probability mass is summed in fixed point, `log_softmax` runs row by row.
Masks are added, not filled (x + -inf), so that a NaN or +inf in a row survives up to `sample_tokens`, which
reports it; the neutral addend is -0.0, the only one that changes no bit.

The order and meaning of the steps follow vLLM v1. Random bits are Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC11); a token is argmax(logits / temperature + Gumbel noise).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
PHILOX_M0 = 0xD2511F53  # multipliers of words 0 and 2
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9  # what the key words grow by each round
PHILOX_W1 = 0xBB67AE85
MASS_ONE = 2.0**40  # fixed-point probability 1: sums of 2^22 tokens fit an int64
SORTED_PREFIX = 1024  # tokens that usually hold the whole top-p set


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per counter. The arguments are int64 tensors in [0, 2^32) that broadcast.

    The product of two 32-bit words may wrap to a negative int64; its bits are right all the same. Words 1 and
    3 are carried with a dirty upper half, which the mask of the following round removes.
    """
    shape = torch.broadcast_tensors(c0, c1, c2, c3, k0, k1)[0].shape  # type: ignore[no-untyped-call]

    def mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
        high = product >> 32
        if high.shape == shape:
            return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(MASK32)
        return (high ^ word ^ key) & MASK32  # the first rounds, while words are still constant along an axis

    for i in range(rounds):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0 = mix(p1, c1, (k0 + i * PHILOX_W0) & MASK32)
        c2 = mix(p0, c3, (k1 + i * PHILOX_W1) & MASK32)
        c1, c3 = p1, p0
    return c0, c1 & MASK32, c2, c3 & MASK32


def gumbel_from_bits(m: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, from 24 random bits: -log(-log u), u = (m + 0.5) 2^-24. Overwrites fp64 m.

    In fp32 m + 0.5 is not representable for large m: u would round to 1 and the noise to +inf. An fp32 kernel
    takes -log1p(-((2^24 - 1 - m) + 0.5) 2^-24) as -log u if m >= 2^23; fp64 holds u exactly, rounding last.
    """
    return m.add_(0.5).mul_(2.0**-24).log_().neg_().log_().neg_().float()


def gumbel(
    vocab_size: int, seeds: Tensor, choices: Tensor, positions: Tensor, purpose: int = 0, first: int = 0
) -> Tensor:
    """Gumbel noise [rows, vocab_size], fp32: a function of seed, choice, position, purpose and vocabulary id.

    Args:
        first: vocabulary id of the first column, a multiple of 4.
        seeds: [rows] int64, the bits of an unsigned 64-bit seed.
        choices: [rows] int64, index of the choice among the n of one prompt.
        positions: [rows] int64, index of the output token that is drawn.
        purpose: what the noise is for; streams of different purposes are independent.
    """
    groups = (vocab_size + 3) // 4
    group = torch.arange(first // 4, first // 4 + groups, device=seeds.device)[None]  # [1, groups]: of four ids
    seeds, choices, positions = seeds[:, None], choices[:, None], positions[:, None]
    words = philox4x32(
        group,
        positions & MASK32,
        torch.full_like(positions, purpose),
        (seeds >> 32) & MASK32,
        seeds & MASK32,
        choices & MASK32,
    )
    noise = torch.empty(seeds.shape[0], groups, 4, device=seeds.device)
    for lane, word in enumerate(words):
        noise[..., lane] = gumbel_from_bits(word.bitwise_right_shift_(8).double())
    return noise.flatten(1)[:, :vocab_size]


def mask_tokens(logits: Tensor, token_ids: Tensor, active: Tensor) -> Tensor:
    """Mask some token ids of every row, in place.

    Args:
        logits: [rows, vocab].
        token_ids: [rows, k] int64; ids may repeat, and are clamped into the vocabulary where not active.
        active: [rows, k] bool; the others are left as they are.
    """
    addend = torch.full(token_ids.shape, -0.0, dtype=logits.dtype, device=logits.device)
    return logits.scatter_add_(1, token_ids.clamp_min(0), addend.masked_fill_(active, -math.inf))


def match_bad_words(words: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
    """Which words would be completed by their last id.

    Args:
        words: [rows, words, length] int64, right-aligned; -1 in a prefix is no condition, as last id no word.
        recent: [rows, length - 1] int64, the last output ids, newest last, -2 where there are none.

    Returns:
        (last ids [rows, words], matched [rows, words] bool), as `mask_tokens` takes them.
    """
    prefix, last = words[..., :-1], words[..., -1]
    matched = ((prefix == recent[:, None, :]) | (prefix == -1)).all(-1)
    return last, matched & (last >= 0)


def apply_penalties(logits: Tensor, history: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Penalise what was said before; returns a new tensor. 1, 0 and 0 change no bit.

    Args:
        logits: [rows, vocab].
        history: [rows, vocab] integer: twice the times an id was generated, plus 1 if the prompt has it.
        repetition: [rows], divides positive and multiplies negative logits of ids in prompt or output.
        frequency: [rows], subtracted once per time the id was generated.
        presence: [rows], subtracted if the id was generated at all.
    """
    counts = history >> 1
    one = torch.ones((), dtype=logits.dtype, device=logits.device)
    factor = torch.where(history > 0, repetition[:, None], one)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * (counts > 0)
    return logits


def _fixed_point(scores: Tensor, best: Tensor) -> Tensor:
    """exp(scores - best) in units of 1 / MASS_ONE, still as floats; to int64 they add up in any order."""
    return (scores - best).exp_().mul_(MASS_ONE)


def _top_p_threshold(
    scores: Tensor, ordered: Tensor, best: Tensor, floor: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Lowest score of the top-p set among scores >= floor; whether `ordered`, the best scores, reached it."""
    kept = _fixed_point(scores, best).masked_fill_(scores < floor, 0.0)
    target = kept.sum(-1, keepdim=True, dtype=torch.int64).double() * top_p
    mass = _fixed_point(ordered, best).to(torch.int64).cumsum(-1).double()
    index = (mass < target).sum(-1, keepdim=True)
    reached = index < ordered.shape[1]
    # Not reached although a top-k bounds the set: ties at its last place go on, and that place is the floor.
    threshold = ordered.gather(1, index.clamp_max(ordered.shape[1] - 1))
    return torch.where(top_p < 1, threshold, floor), reached


def filter_logits(
    scores: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    max_top_k: int = 0,
    open_top_p: bool = True,
) -> Tensor:
    """Mask, in place, all but the candidates: min-p, then top-k, then top-p on what these two leave.

    Each filter is a threshold, and a score equal to it is kept: ties are kept whole. None skips a filter and
    has the bits of its neutral value. A full sort is done only for a top-p set that is larger than
    `SORTED_PREFIX` (on a CPU, where looking costs nothing) or that no top-k bounds (elsewhere).

    Args:
        scores: [rows, vocab], logits over temperature.
        top_k: [rows] int64, 0 keeps all.
        top_p: [rows] float64, 1 keeps all.
        min_p: [rows] float64, 0 keeps all; relative to the best token's probability.
        max_top_k: the largest of top_k, known to the host.
        open_top_p: whether any row may have top_p < 1 and top_k 0.
    """
    vocab_size = scores.shape[1]
    best = scores.amax(-1, keepdim=True)
    floor = torch.full_like(best, -math.inf)
    if min_p is not None:
        floor = best + min_p[:, None].log().to(best.dtype)
    open_top_p = open_top_p and top_p is not None
    width = min(max_top_k, vocab_size)
    if open_top_p:
        width = min(max(width, SORTED_PREFIX), vocab_size) if scores.device.type == "cpu" else vocab_size
    ordered = scores.topk(width).values if width else scores[:, :0]
    if top_k is not None and width:
        kth = ordered.gather(1, (top_k[:, None] - 1).clamp(0, width - 1))
        floor = torch.where(top_k[:, None] > 0, torch.maximum(floor, kth), floor)
    if top_p is not None and width:
        share = top_p[:, None]
        threshold, reached = _top_p_threshold(scores, ordered, best, floor, share)
        if open_top_p and width < vocab_size:
            bounded = share >= 1 if top_k is None else (share >= 1) | (top_k[:, None] > 0)
            if not bool((reached | bounded).all()):
                ordered = scores.sort(descending=True).values
                threshold, _ = _top_p_threshold(scores, ordered, best, floor, share)
        floor = threshold
    return scores.masked_fill_(scores < floor, -math.inf)


def mask_by_bits(scores: Tensor, bits: Tensor) -> Tensor:
    """Mask, in place, the tokens whose bit is 0. bits: [rows, ceil(vocab / 32)] int32, the lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    allowed = (bits.view(torch.uint8)[:, :, None] >> places) & 1  # by bytes: a quarter of the memory
    return scores.masked_fill_(allowed.flatten(1)[:, : scores.shape[1]] == 0, -math.inf)


def sample_tokens(scores: Tensor, noise: Tensor | None = None, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best token of every row, the lowest id on a tie.

    Args:
        scores: [rows, vocab]; overwritten if there is noise.
        noise: [rows, vocab] Gumbel noise, or None if all rows are greedy.
        random: [rows] 1 where the noise counts, 0 where the row is greedy.

    Returns:
        (token ids [rows] int64, finite [rows] bool). A row that holds a NaN or +inf, or nothing but -inf, is
        not finite, and its token is 0.
    """
    if noise is not None:
        assert random is not None
        scores = scores.addcmul_(noise.to(scores.dtype), random[:, None].to(scores.dtype))
    best, token_ids = scores.max(-1)
    finite = best.isfinite()
    return token_ids * finite, finite


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
    """The next token of every row: temperature, filters, Gumbel noise, argmax. Greedy rows take their best score.

    Args:
        scores: [rows, vocab], any float dtype; not written to.
        temperature: [rows]. random: [rows] 1, or 0 where the row is greedy; None if all are.
        seeds, choices, positions: [rows] int64, as `gumbel` takes them.
        top_k, top_p, min_p, max_top_k, open_top_p: as `filter_logits` takes them.

    Returns:
        (token ids [rows] int64, finite [rows] bool), as `sample_tokens` does.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if random is None:
        return sample_tokens(scores)
    scores = scores / temperature[:, None].to(scores.dtype)
    if top_k is not None or top_p is not None or min_p is not None:
        filter_logits(scores, top_k, top_p, min_p, max_top_k, open_top_p)
    return sample_tokens(scores, gumbel(scores.shape[1], seeds, choices, positions), random)


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
    """As `draw` without filters, of a part of the vocabulary: candidates for `best_of_parts`.

    Args:
        scores: [rows, ids], from id `first` on, a multiple of 4.

    Returns:
        Final scores and the vocabulary ids they belong to, as numbers: [2, rows, n], fp32 or fp64. The best is among
        them, of equal ones that of the lowest id; NaN if there is one.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if random is not None:
        scores = scores / temperature[:, None].to(scores.dtype)
        noise = gumbel(scores.shape[1], seeds, choices, positions, first=first)
        scores.addcmul_(noise.to(scores.dtype), random[:, None].to(scores.dtype))
    best, ids = scores.max(-1, keepdim=True)
    return torch.stack((best, (ids + first).to(best.dtype)))


def best_of_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw` of the whole vocabulary, of `draw_part` of every part of it, in order: [parts, 2, rows, n]."""
    scores, ids = parts.permute(1, 2, 0, 3).flatten(2)  # [rows, parts * n]
    best, at = scores.max(-1, keepdim=True)
    finite = best.isfinite()[:, 0]
    return ids.gather(-1, at)[:, 0].long() * finite, finite


def top_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under the raw logits. Equal logits are ordered by id, whatever k.

    Args:
        logits: [rows, vocab], fp32 or fp64.
        token_ids: [rows] int64, the chosen tokens.

    Returns:
        (logprob of the chosen token [rows] fp32; its rank [rows] int64, 1 + the number of better tokens; ids
        of the k best [rows, k] int64; their logprobs [rows, k] fp32).
    """
    vocab_size = logits.shape[1]
    logprobs = logits.log_softmax(-1)
    chosen = token_ids[:, None]
    rank = (logits > logits.gather(1, chosen)).sum(-1) + 1
    # A float's bits order like a sign-magnitude integer; below them goes the id, so no two keys are equal.
    bits = (logits.float() + 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    key += torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    top_ids = (vocab_size - 1) - (key.topk(min(k, vocab_size)).values & MASK32)
    return logprobs.gather(1, chosen)[:, 0].float(), rank, top_ids, logprobs.gather(1, top_ids).float()
