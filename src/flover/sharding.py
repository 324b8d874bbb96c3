"""Which part of each tensor a rank of a tensor-parallel group holds. Arithmetic only: no torch, no communication.

Megatron's scheme (Shoeybi et al. 2019): heads, MLP columns and the vocabulary are divided; KV heads too, or each is
held by several ranks when there are fewer of them than ranks.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from flover.model_config import ModelConfig

Range = tuple[int, int]
ALIGNMENT = 64  # of a part, where the size allows: what GPU kernels like


class Part(NamedTuple):
    """What a rank holds of a whole tensor: ranges of dimension `dim`, joined in order, then `padding` zeros."""

    dim: int
    ranges: tuple[Range, ...]
    padding: int = 0

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.ranges) + self.padding


def split(size: int, rank: int, ranks: int) -> Range:
    """A rank's share of `size` columns: equal if that is possible, else in aligned units, the first ranks one more."""
    if size % ranks == 0:
        unit = size // ranks
    else:
        unit = gcd(size, ALIGNMENT)
        while size // unit < ranks and unit > 1:
            unit //= 2
    each, more = divmod(size // unit, ranks)
    begin = rank * each + min(rank, more)
    return begin * unit, (begin + each + (rank < more)) * unit


def kv_split(kv_heads: int, rank: int, ranks: int) -> Range:
    """A rank's KV heads; with fewer of them than ranks, the one that its query heads read."""
    if kv_heads >= ranks:
        return split(kv_heads, rank, ranks)
    head = rank * kv_heads // ranks
    return head, head + 1


def local_kv_heads(model: ModelConfig, ranks: int) -> int:
    return max(model.num_kv_heads // ranks, 1)


def stage_layers(num_layers: int, stage: int, stages: int) -> Range:
    """The layers of a pipeline's stage; the first stages have one more, since the last one also has the head."""
    each, more = divmod(num_layers, stages)
    begin = stage * each + min(stage, more)
    return begin, begin + each + (stage < more)


def vocab_width(vocab_size: int, ranks: int) -> int:
    """Ids of a rank: all have as many, the last of them fewer real ones."""
    if ranks == 1:
        return vocab_size
    unit = ALIGNMENT if vocab_size >= ALIGNMENT * ranks * ranks else 4
    return -(-vocab_size // (ranks * unit)) * unit


def vocab_part(vocab_size: int, rank: int, ranks: int) -> Part:
    """A rank's ids, as rows of the embedding and of the output head."""
    width = vocab_width(vocab_size, ranks)
    begin = rank * width
    end = min(begin + width, vocab_size)
    return Part(0, ((begin, end),), width - (end - begin))


def check_ranks(model: ModelConfig, ranks: int) -> None:
    """ValueError if the model's heads cannot be divided among so many ranks; names the numbers that work."""
    if divides(model, ranks):
        return
    possible = [str(n) for n in range(1, model.num_heads + 1) if divides(model, n)]
    kv = "" if model.num_kv_heads == model.num_heads else f" and {model.num_kv_heads} KV heads"
    raise ValueError(
        f"tensor_parallel_size={ranks} does not divide the model's {model.num_heads} heads{kv}; "
        f"{', '.join(possible)} would work"
    )


def divides(model: ModelConfig, ranks: int) -> bool:
    """Whether every rank gets as many heads, whole groups of them where KV heads are shared, and some of the ids."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    whole_groups = kv_heads % ranks == 0 or ranks % kv_heads == 0
    return heads % ranks == 0 and whole_groups and (ranks - 1) * vocab_width(model.vocab_size, ranks) < model.vocab_size
