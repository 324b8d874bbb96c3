"""`Group`: the ranks that compute one model together, and what they say to each other.

Alone, every collective is its argument. Collectives come in the same order on all ranks, since all run the same plans.
gloo on a CPU, NCCL on GPUs. No group is ambient: layers, sampler and runner are given theirs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# of one collective: ranks run the same step at the same time, so none waits for long while all live
TIMEOUT = timedelta(seconds=300)


@dataclass(slots=True)
class Group:
    """Rank and size; by itself a group of shapes: what a rank computes can be measured without the others.

    ordered: sums do not depend on the backend's order: parts are gathered and added by rank (batch_invariant).
    capturable: its collectives can be part of a CUDA graph.
    """

    rank: int = 0
    size: int = 1
    ordered: bool = False
    capturable: bool = True

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; x may be overwritten."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank `[size, *x.shape]`."""
        return x.expand(self.size, *x.shape)

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the ranks; x may be overwritten."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x of rank 0; x may be overwritten."""
        return x

    def agree(self, flag: bool, device: torch.device) -> bool:
        """What rank 0 says; the answer travels by way of the device."""
        if self.size == 1:
            return flag
        return bool(self.broadcast(torch.tensor([flag], dtype=torch.int32, device=device)).item())

    def close(self) -> None:
        """Leave; collectives that are under way fail, where the backend can do that."""


ALONE = Group()


class ProcessGroup(Group):
    """Ranks that are connected.

    Args:
        backend: of torch.distributed; see `connect`.
    """

    __slots__ = ("_backend",)

    def __init__(self, rank: int, size: int, backend: Any, ordered: bool = False) -> None:
        super().__init__(rank, size, ordered, not isinstance(backend, dist.ProcessGroupGloo))
        self._backend = backend

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.ordered and self.size > 2:  # of two, either order has the same bits
            total, *others = self.gather(x).unbind()
            for other in others:
                total = total + other
            return total
        x = x.contiguous()
        self._backend.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        out = torch.empty(self.size * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)
        self._backend._allgather_base(out, x.contiguous()).wait()
        return out.view(self.size, *x.shape)

    def largest(self, x: Tensor) -> Tensor:
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        x = x.contiguous()
        self._backend.allreduce([x], options).wait()
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._backend.broadcast([x], dist.BroadcastOptions()).wait()
        return x

    def close(self) -> None:
        with suppress(Exception):  # what is broken need not be left in order
            self._backend.abort()
        self._backend = None  # with the last reference its connections close


def connect(store: Any, rank: int, size: int, device: torch.device, address: str, ordered: bool = False) -> Group:
    """Meet the other ranks; waits for all of them.

    Args:
        store: a torch.distributed store that they share.
        device: NCCL on a GPU that no other rank has, else gloo.
        address: of this machine, as the others reach it.
    """
    if size == 1:
        return ALONE
    if device.type == "cuda" and _own_device(store, rank, size, device):
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        backend: Any = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = TIMEOUT
        options._devices = [gloo.create_device(hostname=address)]
        backend = gloo(store, rank, size, options)
    return ProcessGroup(rank, size, backend, ordered)


def _own_device(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Whether every rank has a GPU of its own: NCCL refuses to share one, gloo goes through the host."""
    store.set(f"device/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    return len({bytes(store.get(f"device/{other}")) for other in range(size)}) == size
