"""The sum over the ranks of one machine in one shot, for messages so small that latency is all they cost.

Every rank has a buffer that the others read over the fast link. A program copies its piece into its rank's buffer,
tells the same program of every other rank, waits to be told by each, and adds all pieces by rank: one crossing of the
link, and the same bits on every rank (as NVIDIA's TensorRT-LLM and vLLM do it in CUDA). `add_up` is a piece of other
kernels too: a norm takes the sum of its input on the way (fused.py).

Nothing is ever cleared: programs count rounds, and a signal is the number of a round. A buffer has two halves that
rounds take in turns: who is told of a round knows that its peers have ended the one before, so that the half which it
writes next is read by nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flover.kernels.triton.common import grid_launch, grid_wait, launch_options

PROGRAMS = tl.constexpr(256)  # at most, in a kernel that exchanges: each has a signal from every rank
PATIENCE = tl.constexpr(1024)  # looks at a signal between looks at `stop`, which is in the host's memory


class Exchange(NamedTuple):
    """What a rank's kernels need to know of all ranks.

    memory: `[size]` int64, addresses of every rank's signals `[PROGRAMS, size]` int32, behind them its two halves of
    `half` bytes. rounds: `[PROGRAMS]` int32, of this rank. stop: one int32 in pinned memory; once it is not zero nobody
    waits any more, and what comes out means nothing.
    """

    memory: Tensor
    rounds: Tensor
    stop: Tensor
    rank: int
    size: int
    half: int

    def fits(self, x: Tensor) -> bool:
        """Whether x `[rows, n]` is a message for it, also with a program for each row."""
        small = x.nbytes <= self.half and len(x) <= PROGRAMS.value
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
        names = {"memory": self.memory, "rounds": self.rounds, "stop": self.stop, "half": self.half}
        return names | {"RANK": self.rank, "SIZE": self.size}


def signal_bytes(size: int) -> int:
    """In front of a rank's halves."""
    return int(PROGRAMS.value) * size * 4


@triton.jit
def _meet(memory, stop, round, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Tell this program of all ranks that the round's data is written, wait until they do; -> whether they did."""
    slot = tl.program_id(0) * SIZE
    going = tl.program_id(0) >= 0  # a constant would have no shape
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            there = tl.load(memory + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(there + slot + RANK, round, sem="release", scope="sys")
    here = tl.load(memory + RANK).to(tl.pointer_type(tl.int32)) + slot
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            looks = 0
            seen = tl.atomic_add(here + peer, 0, sem="acquire", scope="sys")
            while (seen - round < 0) & going:  # a difference, since numbers wrap
                looks += 1
                if looks % PATIENCE == 0:
                    going = tl.load(stop, volatile=True) == 0
                seen = tl.atomic_add(here + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    return going


@triton.jit
def begin_round(rounds):
    return tl.load(rounds + tl.program_id(0)) + 1


@triton.jit
def end_round(rounds, round):
    """Programs that this launch does not have count, too, so that all are at the same round."""
    slots = tl.arange(0, PROGRAMS)
    mine = slots % tl.num_programs(0) == tl.program_id(0)
    tl.store(rounds + slots, tl.zeros([PROGRAMS], tl.int32) + round, mask=mine)


@triton.jit
def _half_of(memory, rank, round, half, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """A rank's half of this round."""
    address = tl.load(memory + rank) + PROGRAMS * SIZE * 4 + (round % 2 != 0).to(tl.int64) * half
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def add_up(value, at, inside, memory, stop, round, half, RANK: tl.constexpr, SIZE: tl.constexpr):
    """The sum over the ranks of a program's block, which is at `at` of the message; once in a round."""
    DTYPE: tl.constexpr = value.dtype
    tl.store(_half_of(memory, RANK, round, half, SIZE, DTYPE) + at, value, mask=inside)
    total = value
    if _meet(memory, stop, round, RANK, SIZE):
        for rank in tl.static_range(SIZE):
            part = value
            if rank != RANK:
                part = tl.load(_half_of(memory, rank, round, half, SIZE, DTYPE) + at, mask=inside, other=0.0)
            if rank == 0:
                total = part
            else:
                total += part  # rounded as a sum of tensors is
    return total


@triton.jit
def _all_reduce(
    x,
    out,
    memory,
    rounds,
    stop,
    num_elements,
    half,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_launch(PDL)
    grid_wait(PDL)
    round = begin_round(rounds)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    value = tl.load(x + at, mask=inside, other=0.0)
    total = add_up(value, at, inside, memory, stop, round, half, RANK, SIZE)
    tl.store(out + at, total, mask=inside)
    end_round(rounds, round)
