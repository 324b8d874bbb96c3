"""`Group`: the ranks that compute one model together, and what they say to each other.

Alone, every collective is its argument. Collectives come in the same order on all ranks, since all run the same plans.
gloo on a CPU, NCCL on GPUs, and for small sums of GPUs that reach each other's memory an `Exchange`. No group is
ambient: layers, sampler and runner are given theirs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# of one collective: ranks run the same step at the same time, so none waits for long while all live
TIMEOUT = timedelta(seconds=300)


class Pipe:
    """A rank's place among the stages of a pipeline, and its connections to the others.

    Args:
        stage: the first one embeds, the last one has the head, and samples.
        backend: of torch.distributed, in which a stage's number counts from the last one: the last is rank 0.
    """

    def __init__(self, stage: int = 0, stages: int = 1, backend: Any = None) -> None:
        self.stage, self.stages, self._backend = stage, stages, backend
        self._sent: list[tuple[Any, Tensor]] = []  # on their way

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def _number(self, stage: int) -> int:
        return self.stages - 1 - stage

    def send(self, x: Tensor) -> None:
        """To the next stage; returns at once, so that this one can go on."""
        x = x.contiguous()
        self._sent.append((self._backend.send([x], self._number(self.stage + 1), 0), x))

    def receive(self, like: Tensor) -> Tensor:
        """From the stage before, in the shape and type of `like`."""
        x = torch.empty_like(like)
        self._backend.recv([x], self._number(self.stage - 1), 0).wait()
        return x

    def flush(self) -> None:
        """Wait until what was sent has gone."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def share(self, tokens: Tensor) -> Tensor:
        """The tokens that the last stage drew, on every stage; `tokens` may be overwritten."""
        if self.stages > 1:
            self._backend.broadcast([tokens], dist.BroadcastOptions()).wait()
        return tokens

    def close(self) -> None:
        """Leave; its connections close with the last reference."""
        self._backend = None
        self._sent.clear()


WHOLE = Pipe()


class Exchange(Protocol):
    """Memory that kernels of all ranks share (`kernels.triton.exchange`), for sums of what `fits`."""

    def fits(self, x: Tensor) -> bool: ...
    def all_reduce(self, x: Tensor) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Group:
    """Rank and size; by itself a group of shapes: what a rank computes can be measured without the others.

    ordered: sums do not depend on the backend's order: parts are gathered and added by rank (batch_invariant).
    capturable: its collectives can be part of a CUDA graph. pipe: the stage that this group computes.
    exchange: for small sums; None: there is none.
    """

    rank: int = 0
    size: int = 1
    ordered: bool = False
    capturable: bool = True
    pipe: Pipe = WHOLE
    exchange: Exchange | None = None

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
        self.pipe.close()


ALONE = Group()


class Partial:
    """A rank's part of a sum over the ranks that nobody has taken yet.

    A norm takes it on its way (`layers.norm`); parts of two sums are added first, and then it is one sum.
    """

    def __init__(self, part: Tensor, group: Group) -> None:
        self.part, self.group = part, group

    def whole(self) -> Tensor:
        return self.group.all_reduce(self.part)

    def __add__(self, other: Tensor | Partial) -> Tensor | Partial:
        if isinstance(other, Partial):
            return Partial(self.part + other.part, self.group)
        return self.whole() + other

    __radd__ = __add__


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
        if self.exchange is not None and self.exchange.fits(x):
            return self.exchange.all_reduce(x)  # by rank, too
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
        if self.exchange is not None:
            self.exchange.close()
        with suppress(Exception):  # what is broken need not be left in order
            self._backend.abort()
        Group.close(self)
        self._backend = None  # with the last reference its connections close


def connect(store: Any, rank: int, size: int, device: torch.device, address: str, ordered: bool = False) -> Group:
    """Meet the other ranks; waits for all of them.

    Args:
        store: a torch.distributed store that they share.
        device: NCCL on a GPU that no other rank has, else gloo.
        address: of this machine, as the others reach it.
    """
    if size == 1:
        return Group(ordered=ordered)
    if device.type == "cuda" and _own_device(store, rank, size, device):
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        backend: Any = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        backend = _gloo(store, rank, size, address)
    return ProcessGroup(rank, size, backend, ordered)


def connect_stages(store: Any, stage: int, stages: int, address: str) -> Pipe:
    """Meet the ranks of the same place in the other stages."""
    return WHOLE if stages == 1 else Pipe(stage, stages, _gloo(store, stages - 1 - stage, stages, address))


def _gloo(store: Any, rank: int, size: int, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = TIMEOUT
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _own_device(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Whether every rank has a GPU of its own: NCCL refuses to share one, gloo goes through the host."""
    store.set(f"device/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    return len({bytes(store.get(f"device/{other}")) for other in range(size)}) == size
