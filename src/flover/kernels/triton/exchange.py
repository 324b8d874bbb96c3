"""The sum over the ranks of one machine in one shot, for messages so small that latency is all they cost.

A program writes its piece into the memory of every other rank, over the fast link, and waits until theirs have come;
then it adds all pieces by rank, so that every rank has the same bits. No signal says that a piece has come: memory is
full of `EMPTY` until it does, a bit pattern that no piece has (NVIDIA's TensorRT-LLM calls this Lamport). `add_up` is a
piece of other kernels too: a norm takes the sum of its input on the way (fused.py).

Rounds take two halves of the memory in turns. Who reads a piece empties its place at once: a peer writes there again
two rounds later, after it has seen what this rank sent in between, from a kernel that began when this one had ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options

PROGRAMS = tl.constexpr(256)  # at most, in a kernel that exchanges: each counts its rounds
PATIENCE = tl.constexpr(4096)  # looks at a piece between looks at `stop`, which is in the host's memory
EMPTY = 0x8000  # of 16 bits: -0.0


class Exchange(NamedTuple):
    """What a rank's kernels need to know of all ranks.

    memory: addresses of every rank's places `[2, size, capacity]`, in bytes: two halves, a place for each sender.
    rounds: `[PROGRAMS]` int32, of this rank. stop: one int32 in pinned memory; once it is not zero nobody waits any
    more, and what comes out means nothing.
    """

    memory: tuple[int, ...]
    rounds: Tensor
    stop: Tensor
    rank: int
    capacity: int

    def fits(self, x: Tensor) -> bool:
        """Whether x `[rows, n]` is a message for it, also with a program for each row."""
        small = x.nbytes <= self.capacity and len(x) <= PROGRAMS.value
        return small and x.is_contiguous() and x.nbytes % 16 == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which `fits`; all ranks exchange the same messages in the same order."""
        out = torch.empty_like(x)
        block = max(1024, triton.next_power_of_2(triton.cdiv(x.numel(), PROGRAMS.value)))
        _all_reduce[(triton.cdiv(x.numel(), block),)](
            x,
            out,
            num_elements=x.numel(),
            **self.arguments(),
            BLOCK=block,
            num_warps=min(max(block // 256, 4), 16),
            **launch_options(x.device),
        )
        return out

    def close(self) -> None:
        """Nobody waits any more."""
        self.stop.fill_(1)

    def arguments(self) -> dict[str, Any]:
        """Of `add_up`, by name."""
        names = {"memory": self.memory, "rounds": self.rounds, "stop": self.stop, "capacity": self.capacity}
        return names | {"RANK": self.rank, "SIZE": len(self.memory)}


@triton.jit
def _missing(value):
    """Which numbers are EMPTY."""
    if value.dtype.primitive_bitwidth == 16:
        missing = value.to(tl.int16, bitcast=True) == -0x8000
    else:
        missing = value.to(tl.int32, bitcast=True) == -0x7FFF8000
    return missing


@triton.jit
def _emptied(value):
    """EMPTY in value's shape and type."""
    if value.dtype.primitive_bitwidth == 16:
        empty = tl.full(value.shape, -0x8000, tl.int16)
    else:
        empty = tl.full(value.shape, -0x7FFF8000, tl.int32)
    return empty.to(value.dtype, bitcast=True)


@triton.jit
def _place(base, round, sender, capacity, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Where a sender's message of this round is, in the memory that begins at base."""
    offset = ((round & 1) * SIZE + sender).to(tl.int64) * capacity
    return tl.multiple_of((base + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def add_up(value, at, inside, memory, rounds, stop, capacity, RANK: tl.constexpr, SIZE: tl.constexpr):
    """The sum over the ranks of a program's block, which is at `at` of the message; once in a kernel."""
    DTYPE: tl.constexpr = value.dtype
    round = tl.load(rounds + tl.program_id(0))
    value = tl.where(_missing(value), 0.0, value)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(_place(memory[peer], round, RANK, capacity, SIZE, DTYPE) + at, value, mask=inside)
    total = value
    waiting = tl.program_id(0) >= 0  # a constant would have no shape
    for sender in tl.static_range(SIZE):
        part = value
        if sender != RANK:
            here = _place(memory[RANK], round, sender, capacity, SIZE, DTYPE) + at
            part = tl.load(here, mask=inside, other=0.0, volatile=True)
            looks = 0
            while (tl.max(_missing(part).to(tl.int32), 0) > 0) & waiting:
                part = tl.load(here, mask=inside, other=0.0, volatile=True)
                looks += 1
                if looks % PATIENCE == 0:
                    waiting = tl.load(stop, volatile=True) == 0
            tl.store(here, _emptied(value), mask=inside)
        if sender == 0:
            total = part
        else:
            total += part  # rounded as a sum of tensors is
    # programs that this launch does not have count, too, so that all are at the same round
    slots = tl.arange(0, PROGRAMS)
    mine = slots % tl.num_programs(0) == tl.program_id(0)
    tl.store(rounds + slots, tl.zeros([PROGRAMS], tl.int32) + (round + 1), mask=mine)
    return total


@triton.jit
def _all_reduce(
    x,
    out,
    memory,
    rounds,
    stop,
    num_elements,
    capacity,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    value = tl.load(x + at, mask=inside, other=0.0)
    total = add_up(value, at, inside, memory, rounds, stop, capacity, RANK, SIZE)
    tl.store(out + at, total, mask=inside)
