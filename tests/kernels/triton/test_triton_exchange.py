"""The one-shot sum over ranks. One process plays a rank, and has written what the others would have."""

import pytest
import torch
from triton_device import DEVICE

from flover.kernels import reference
from flover.kernels.triton import exchange as module
from flover.kernels.triton import rms_norm
from flover.kernels.triton.exchange import Exchange

PROGRAMS, CAPACITY = module.PROGRAMS.value, 1 << 15


class Peers:
    """A rank's view of a group, in which the others are always a step ahead."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.round = rank, size, 0
        shape = 2, size, CAPACITY // 2
        self.memory = [torch.full(shape, -0x8000, dtype=torch.int16, device=DEVICE) for _ in range(size)]
        self.exchange = Exchange(
            tuple(m.data_ptr() for m in self.memory),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE.type == "cuda"),
            rank,
            CAPACITY,
        )

    def places(self, owner: int, sender: int, like: torch.Tensor) -> torch.Tensor:
        return self.memory[owner][self.round % 2, sender, : like.nbytes // 2]

    def send(self, parts: torch.Tensor) -> None:
        """What the others have of a round `[size, ...]`."""
        for rank, part in enumerate(parts):
            if rank != self.rank:
                self.places(self.rank, rank, part).copy_(part.reshape(-1).view(torch.int16))

    def check(self, part: torch.Tensor) -> None:
        """This rank's part is with all others, and what they sent is gone."""
        for rank in range(self.size):
            if rank != self.rank:
                sent = self.places(rank, self.rank, part)
                assert torch.equal(sent.view(part.dtype), part.reshape(-1))
                sent.fill_(-0x8000)
        assert all((m == -0x8000).all() for m in self.memory)
        self.round += 1
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
    for shape in [(3, 64), (1, 8), (5, 1000), (2, 64), (0, 8)]:
        parts = torch.randn(size, *shape, device=DEVICE).to(dtype)
        peers.send(parts)
        out = peers.exchange.all_reduce(parts[rank])
        assert torch.equal(out, summed(parts))
        if len(out):
            peers.check(parts[rank])


def test_what_looks_like_nothing_arrives(dtype: torch.dtype) -> None:
    """The bit pattern of empty memory is sent as zero, others as they are, NaN too."""
    peers = Peers(0, 2)
    empty = torch.full((16,), -0x8000, dtype=torch.int16, device=DEVICE).view(dtype)[None]
    parts = torch.stack([empty, torch.full_like(empty, 3.0)])
    parts[1, 0, 0] = float("nan")
    peers.send(parts)
    out = peers.exchange.all_reduce(parts[0])
    assert out[0, 0].isnan()
    assert (out[0, 1:] == 3.0).all()
    peers.check(torch.zeros_like(empty))


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
        peers.send(parts)
        normed, stream = rms_norm(x, weight, 1e-5, residual=parts[1], exchange=peers.exchange)
        peers.check(parts[1])
        expected = rms_norm(x, weight, 1e-5, residual=summed(parts))
        assert torch.equal(stream, expected[1])
        assert torch.equal(normed, expected[0])
        twin, _ = reference.rms_norm(x, weight, 1e-5, residual=summed(parts))
        torch.testing.assert_close(normed, twin, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=1e-2)
