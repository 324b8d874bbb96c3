"""What every family shares: the model's base class, the weight-name table and `ModelConfig`'s way in.

A family file holds a `CausalLM` with `forward(input_ids, positions, ctx)` and one `WEIGHTS` table from its
own parameter names to the checkpoint's. `{i}` in both stands for the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flover.layers.attention import ForwardContext
from flover.layers.embedding import LMHead
from flover.model_config import ModelConfig
from flover.models.checkpoint import Stored
from flover.sharding import Part


def concatenate(tensors: list[Tensor], _: ModelConfig) -> Tensor:
    """On dim 0, the output dimension."""
    return torch.cat(tensors)


def joined_parts(part: Part, stored: Sequence[Stored]) -> list[Stored]:
    """Where a part of what `concatenate` makes of tensors lies."""
    if part.dim > 0:
        return [one.take(part.dim, *part.ranges[0]) for one in stored]
    parts, start = [], 0
    for one in stored:
        end = start + one.shape[0]
        parts += [
            one.take(0, max(a, start) - start, min(b, end) - start) for a, b in part.ranges if a < end and b > start
        ]
        start = end
    return parts


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: checkpoint names, and how they become one tensor (joined on dim 0).

    parts: where a part of the parameter lies in those tensors; `op` makes the part of what is there.
    """

    names: tuple[str, ...]
    op: Callable[[list[Tensor], ModelConfig], Tensor] = concatenate
    parts: Callable[[Part, Sequence[Stored]], list[Stored]] = joined_parts


def join(*names: str) -> Source:
    """Concatenate checkpoint tensors on their output dimension (fused QKV, fused gate/up)."""
    return Source(names)


def transposed(name: str) -> Source:
    """A weight stored `[in, out]` (GPT-2's Conv1D)."""

    def parts(part: Part, stored: Sequence[Stored]) -> list[Stored]:
        return [stored[0].take(1 - part.dim, *bounds) for bounds in part.ranges]

    return Source((name,), lambda tensors, _: torch.cat([tensor.t() for tensor in tensors]), parts)


def per_head(name: str) -> Source:
    """Fused QKV stored as `[heads, 3, head_dim]` (GPT-NeoX, BLOOM), put in the order `[3, heads, head_dim]`."""

    def op(tensors: list[Tensor], config: ModelConfig) -> Tensor:
        heads = tensors[0].view(-1, 3, config.head_dim, *tensors[0].shape[1:])
        return heads.transpose(0, 1).flatten(0, 2)

    def parts(part: Part, stored: Sequence[Stored]) -> list[Stored]:
        begin, end = part.ranges[0]  # of the queries; keys and values are of the same heads
        return [stored[0].take(0, 3 * begin, 3 * end)]

    return Source((name,), op, parts)


class CausalLM(nn.Module):
    """A family. `WEIGHTS`: parameter name -> checkpoint name or `Source`. `IGNORED`: regular expressions of
    checkpoint names that carry nothing (buffers). `PREFIX`: put before checkpoint names that lack it (bare
    base-model checkpoints).
    `RENAMED`: other spellings of checkpoint names.
    """

    WEIGHTS: ClassVar[Mapping[str, str | Source]] = {}
    IGNORED: ClassVar[tuple[str, ...]] = ()
    PREFIX: ClassVar[str] = ""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    lm_head: LMHead

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """`[num_tokens]`, `[num_tokens]` -> hidden states `[num_tokens, hidden_size]`, final norm applied."""
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden_size]` -> `[n, vocab_size]`."""
        logits: Tensor = self.lm_head(hidden)
        return logits
