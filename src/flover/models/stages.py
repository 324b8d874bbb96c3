"""A model cut into the stages of a pipeline: a rank keeps some of the layers, and hands the residual stream on.

Model files know nothing of it. Layers of other stages become `Skip`s, so that places stay what they are; the last place
before a stage receives its input, the first one after it sends its output. Between stages the stream is one tensor,
x + delta, which is what the next norm would have made of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flover.parallel import Pipe
from flover.sharding import stage_layers


class Skip(nn.Module):
    """A layer that another stage computes."""

    def forward(self, x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor | None]:
        return x, delta


class Receive(Skip):
    """The stream as the stage before leaves it; what is passed in has its shape."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self.pipe = pipe

    def forward(self, x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor | None]:
        return self.pipe.receive(x), None


class Send(Receive):
    """The stream to the next stage."""

    def forward(self, x: Tensor, delta: Tensor | None, *_: Any) -> tuple[Tensor, Tensor | None]:
        x = x if delta is None else x + delta
        self.pipe.send(x)
        return x, None


class Blank:
    """In place of an embedding whose stage this is not: zeros of its shape."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        self.dim, self.dtype = dim, dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), self.dim, dtype=self.dtype, device=ids.device)


def no_logits(hidden: Tensor) -> Tensor:
    """In place of a head whose stage this is not: of no ids."""
    return hidden.new_empty(len(hidden), 0)


def cut(module: Any, pipe: Pipe, dtype: torch.dtype) -> None:
    """Leave the rank's stage of a model that is still without memory.

    Raises:
        ValueError: a model without layers to divide.
    """
    if not hasattr(module, "layers"):
        raise ValueError(f"{type(module).__name__} cannot be divided into stages: pipeline_parallel_size=1 works")
    begin, end = stage_layers(len(module.layers), pipe.stage, pipe.stages)
    for i in range(len(module.layers)):
        if not begin <= i < end:
            module.layers[i] = Receive(pipe) if i == begin - 1 else Send(pipe) if i == end else Skip()
    tied = module.lm_head.weight is module.embed.weight
    if not pipe.first:
        module.embed.forward = Blank(module.embed.weight.shape[1], dtype)
        if not (pipe.last and tied):
            module.embed.weight = None
    if not pipe.last:
        module.lm_head.weight = module.lm_head.bias = None
        module.lm_head.forward = no_logits
