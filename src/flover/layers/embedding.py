"""Token and position embeddings, and the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flover.layers.linear import Linear


class Embedding(nn.Module):
    """Rows of weight `[num_embeddings, dim]`."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LMHead(Linear):
    """The output projection; `tie` makes it share the token embedding's weight."""

    def tie(self, embedding: Embedding) -> LMHead:
        self.weight = embedding.weight
        return self
