"""Token and position embeddings, and the output head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flover.layers.base import Layer
from flover.layers.linear import Linear
from flover.parallel import Group
from flover.sharding import Part, vocab_part


class Embedding(Layer):
    """Rows of weight `[num_embeddings, dim]`."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class VocabEmbedding(Embedding):
    """Divided by ids: the rank that has a row contributes it, the others zero."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__(num_embeddings, dim)
        self.num_embeddings, self.first = num_embeddings, 0

    def shard(self, group: Group) -> Mapping[str, Part]:
        super().shard(group)
        part = vocab_part(self.num_embeddings, group.rank, group.size)
        self.first = part.ranges[0][0]
        return {"weight": part}

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return super().forward(ids)
        own = ids - self.first
        elsewhere = (own < 0) | (own >= len(self.weight))
        rows = super().forward(own.masked_fill(elsewhere, 0))
        return self.group.all_reduce(rows.masked_fill(elsewhere[:, None], 0))


class LMHead(Linear):
    """The output projection, divided by ids, the last ones padded; `tie`: it shares the token embedding's weight."""

    def __init__(self, in_features: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__(in_features, vocab_size, bias)
        self.vocab_size = vocab_size

    def tie(self, embedding: Embedding) -> LMHead:
        self.weight = embedding.weight
        return self

    def shard(self, group: Group) -> Mapping[str, Part]:
        super().shard(group)
        return dict.fromkeys(("weight", "bias"), vocab_part(self.vocab_size, group.rank, group.size))
