"""The one-shot sum over ranks. One process plays a rank, and has written what the others would have."""

import pytest
import torch
from triton_device import DEVICE

from flover.kernels import reference
from flover.kernels.triton import exchange as module
from flover.kernels.triton import rms_norm
from flover.kernels.triton.exchange import Exchange

PROGRAMS, HALF = module.PROGRAMS.value, 1 << 16


class Peers:
    """A rank's view of a group, in which the others are always a step ahead."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.round = rank, size, 0
        front = module.signal_bytes(size)
        self.memory = [torch.zeros(front + 2 * HALF, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        self.signals = [m[:front].view(torch.int32).view(PROGRAMS, size) for m in self.memory]
        self.exchange = Exchange(
            torch.tensor([m.data_ptr() for m in self.memory], device=DEVICE),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE.type == "cuda"),
            rank,
            size,
            HALF,
        )

    def write(self, parts: torch.Tensor, start: int = 0) -> None:
        """What the others have of a round `[size, ...]`; start: the number of the round before."""
        self.round = (self.round or start) + 1
        for rank, part in enumerate(parts):
            if rank != self.rank:
                half = self.memory[rank][module.signal_bytes(self.size) + self.round % 2 * HALF :][: part.nbytes]
                half.copy_(part.contiguous().view(-1).view(torch.uint8))
        self.signals[self.rank].fill_(self.round)

    def check_told(self, programs: int) -> None:
        for rank, signals in enumerate(self.signals):
            if rank != self.rank:
                assert (signals[:programs, self.rank] == self.round).all()
        assert (self.exchange.rounds == self.round).all()


def summed(parts: torch.Tensor) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 3)])
def test_sum_by_rank_over_rounds(rank: int, size: int, dtype: torch.dtype) -> None:
    """Messages of several sizes in a row use the halves in turns; bits are those of a sum in the order of ranks."""
    peers = Peers(rank, size)
    torch.manual_seed(0)
    for shape in [(3, 64), (1, 8), (5, 1000), (2, 64)]:
        parts = torch.randn(size, *shape, device=DEVICE).to(dtype)
        peers.write(parts)
        out = peers.exchange.all_reduce(parts[rank])
        assert torch.equal(out, summed(parts))
        peers.check_told(1)
    assert peers.round == 4


def test_round_numbers_wrap() -> None:
    peers = Peers(0, 2)
    peers.exchange.rounds.fill_(2**31 - 1)
    parts = torch.randn(2, 1, 16, device=DEVICE)
    peers.round = -(2**31) - 1
    peers.write(parts)
    assert torch.equal(peers.exchange.all_reduce(parts[0]), summed(parts))


def test_nobody_waits_once_it_is_stopped() -> None:
    peers = Peers(0, 2)
    peers.exchange.close()
    peers.exchange.all_reduce(torch.ones(1, 16, device=DEVICE))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def test_norm_of_a_sum_over_ranks(dtype: torch.dtype) -> None:
    """The norm that takes the sum on the way has the bits of the sum and the norm one after the other."""
    peers = Peers(1, 2)
    torch.manual_seed(0)
    for rows in (3, 1):
        x, weight = torch.randn(rows, 96, device=DEVICE).to(dtype), torch.randn(96, device=DEVICE).to(dtype)
        parts = torch.randn(2, rows, 96, device=DEVICE).to(dtype)
        peers.write(parts)
        normed, stream = rms_norm(x, weight, 1e-5, residual=parts[1], exchange=peers.exchange)
        peers.check_told(rows)
        expected = rms_norm(x, weight, 1e-5, residual=summed(parts))
        assert torch.equal(stream, expected[1])
        assert torch.equal(normed, expected[0])
        twin, _ = reference.rms_norm(x, weight, 1e-5, residual=summed(parts))
        torch.testing.assert_close(normed, twin, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=1e-2)
