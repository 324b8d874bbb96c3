"""`Group`: the ranks that compute one model together, and what they say to each other.

Alone, every collective is its argument. Collectives come in the same order on all ranks, since all run the same plans.
gloo on a CPU, NCCL on GPUs, and for small sums of GPUs that reach each other's memory an `Exchange`. No group is
ambient: layers, sampler and runner are given theirs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# of one collective: ranks run the same step at the same time, so none waits for long while all live
TIMEOUT = timedelta(seconds=300)
CPU = torch.device("cpu")


class Pipe:
    """A rank's place among the stages of a pipeline, and its connections to the others.

    On GPUs all is enqueued in the order of the calls: a part of a step is received, computed and sent, then the next
    part, and in the end tokens are shared. Each waits only for parts before its own, in any stage, or for its own in a
    stage before; so nothing waits in a circle, even where a send ends no sooner than it is received.

    Args:
        stage: the first one embeds, the last one has the head, and samples.
        backend: of torch.distributed, in which a stage's number counts from the last one: the last is rank 0.
        device: of the tensors that the backend takes; others are copied.
    """

    def __init__(self, stage: int = 0, stages: int = 1, backend: Any = None, device: torch.device = CPU) -> None:
        self.stage, self.stages, self._backend, self._device = stage, stages, backend, device
        self._sent: list[tuple[Any, Tensor]] = []  # on their way

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def capturable(self) -> bool:
        """As of a group."""
        return _capturable(self._backend)

    def send(self, x: Tensor) -> None:
        """To the next stage; returns at once, so that this one can go on."""
        x = x.to(self._device).contiguous()
        self._sent.append((self._start(self._backend.send, x, self.stage + 1), x))

    def receive(self, like: Tensor) -> Tensor:
        """From the stage before, in the shape and type of `like`."""
        x = torch.empty_like(like, device=self._device)
        self._start(self._backend.recv, x, self.stage - 1).wait()
        return x.to(like.device)

    def _start(self, operation: Any, x: Tensor, stage: int) -> Any:
        number = self.stages - 1 - stage
        if not self._backend.supports_coalescing:
            return operation([x], number, 0)
        # a batch of one: outside of batches NCCL connects each pair of ranks anew, when they first need it
        self._backend._start_coalescing()
        operation([x], number, 0)
        return self._backend._end_coalescing()

    def flush(self) -> None:
        """Wait until what was sent has gone: the caller, or on GPUs what is enqueued from here on."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def share(self, x: Tensor) -> Tensor:
        """x of the last stage, on every stage; x may be overwritten."""
        if self.stages == 1:
            return x
        shared = x.to(self._device).contiguous()
        self._backend.broadcast([shared], dist.BroadcastOptions()).wait()
        return shared.to(x.device)

    def close(self) -> None:
        """Leave; what is under way fails, where the backend can do that."""
        with suppress(Exception):  # what is broken need not be left in order
            self._backend.abort()
        self._backend = None  # with the last reference its connections close
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
        """What rank 0 of the last stage says; the answer travels by way of the device."""
        if self.size == self.pipe.stages == 1:
            return flag
        said = self.broadcast(torch.tensor([flag], dtype=torch.int32, device=device))
        return bool(self.pipe.share(said).item())

    def close(self) -> None:
        """Leave; collectives that are under way fail, where the backend can do that."""
        self.pipe.close()


ALONE = Group()


class Partial:
    """A rank's part of a sum over the ranks that nobody has taken yet.

    A norm takes it on its way (`layers.norm`).
    """

    def __init__(self, part: Tensor, group: Group) -> None:
        self.part, self.group = part, group

    def whole(self) -> Tensor:
        return self.group.all_reduce(self.part)

    def __radd__(self, other: Tensor) -> Tensor:
        return other + self.whole()


class ProcessGroup(Group):
    """Ranks that are connected.

    Args:
        backend: of torch.distributed; see `connect`.
    """

    __slots__ = ("_backend",)

    def __init__(self, rank: int, size: int, backend: Any, ordered: bool = False) -> None:
        super().__init__(rank, size, ordered, _capturable(backend))
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
        pipe = Thread(target=self.pipe.close)  # at once: a kernel that waits for one may keep the other from ending
        pipe.start()
        with suppress(Exception):  # what is broken need not be left in order
            self._backend.abort()
        pipe.join()
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
    return ProcessGroup(rank, size, _backend(store, rank, size, device, address), ordered)


def connect_stages(store: Any, stage: int, stages: int, device: torch.device, address: str) -> Pipe:
    """Meet the ranks of the same place in the other stages; as `connect`."""
    if stages == 1:
        return WHOLE
    backend = _backend(store, stages - 1 - stage, stages, device, address)
    pipe = Pipe(stage, stages, backend, device if _capturable(backend) else CPU)
    pipe.share(torch.zeros(1, device=device))  # NCCL connects now, while all are here, not within a step
    return pipe


def _capturable(backend: Any) -> bool:
    return not isinstance(backend, dist.ProcessGroupGloo)


def _backend(store: Any, rank: int, size: int, device: torch.device, address: str) -> Any:
    if device.type == "cuda" and _own_device(store, rank, size, device):
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = TIMEOUT
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _own_device(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Whether every rank has a GPU of its own: NCCL refuses to share one, gloo goes through the host."""
    store.set(f"device/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    return len({bytes(store.get(f"device/{other}")) for other in range(size)}) == size
