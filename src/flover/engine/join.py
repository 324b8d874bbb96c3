"""How ranks come together: what must be alike on all of them, where they meet, and what executor rank 0 then has."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

import flover
from flover.config import EngineConfig, ResolvedConfig
from flover.engine.group import GroupExecutor, LocalExecutor
from flover.engine.launch import COMMAND, Launch, launched, ranks_here
from flover.engine.links import JOIN_SECONDS, TICK, GroupDeadError, Ranks, await_ranks, start_ranks
from flover.engine.wire import Assignment, Described, Go, Hello, Loaded
from flover.models.registry import backend_of
from flover.parallel import Group, connect, connect_stages

SAMPLE = 256  # bytes at the beginning, in the middle and at the end of each tensor
T = TypeVar("T")


def describe(config: ResolvedConfig, folder: Path) -> Described:
    """What must be the same on all ranks; weights by their headers and samples of every tensor, which takes no time."""
    facts = {
        "version of flover": flover.__version__,
        "version of torch": str(torch.__version__),
        "settings": sha256(msgspec.msgpack.encode(config)).hexdigest()[:16],
        "config.json": sha256((folder / "config.json").read_bytes()).hexdigest()[:16],
    }
    if launched() is not None:
        facts["command"] = os.environ.get(COMMAND, "")
    if config.engine.load_format != "dummy":
        facts["weights"] = _fingerprint(folder)
    return Described(facts)


def _fingerprint(folder: Path) -> str:
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(head := file.read(8), "little")
            header = file.read(min(size, path.stat().st_size))
            digest.update(path.name.encode() + head + header)
            tensors = msgspec.json.decode(header)
            tensors.pop("__metadata__", None)
            for entry in tensors.values():
                begin, end = entry["data_offsets"]
                for at in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                    file.seek(8 + size + at)
                    digest.update(file.read(min(SAMPLE, end - at)))
    return digest.hexdigest()[:16]


def check_alike(mine: Described, others: list[tuple[int, Described]]) -> None:
    """ValueError if a rank has another version, command, config or checkpoint; says which, with both values."""
    for rank, theirs in others:
        for what, value in mine.facts.items():
            if theirs.facts.get(what) != value:
                raise ValueError(f"rank {rank} has another {what}: {theirs.facts.get(what)}, rank 0 has {value}")


def use_threads(config: EngineConfig, device: str) -> None:
    """CPU threads of this process: as given, else a fair share of the cores for each rank of this machine."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.num_ranks > 1 and device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // ranks_here(config.num_ranks), 1))


def open_store(launch: Launch) -> Any:
    """The store of ranks that torchrun has started.

    Raises:
        ValueError: the port is taken, or nobody serves it.
    """
    serves = launch.rank == 0 and not launch.agent_store
    try:
        return TCPStore(launch.host, launch.port, None, serves, timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        in_use = "EADDRINUSE" in str(error) or "in use" in str(error)
        reason = "the port is in use" if in_use else "nobody answers there"
        raise ValueError(f"MASTER_ADDR {launch.host}, MASTER_PORT {launch.port}: {reason}") from None


def where_key() -> str:
    """In the store: where rank 0 listens. torchrun may start all ranks again with the same store."""
    return f"flover/where/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def meet(store: Any, prefix: str, rank: int, config: ResolvedConfig, address: str) -> Group:
    """The process group of the rank's stage, connected with those of the others; waits for all of them.

    The last stage has the lowest ranks, so that rank 0 samples.
    """
    engine = config.engine
    behind, place = divmod(rank, engine.tensor_parallel_size)  # stages behind its own
    stages = engine.pipeline_parallel_size
    own, across = PrefixStore(f"{prefix}/stage{behind}", store), PrefixStore(f"{prefix}/pipe{place}", store)
    device = torch.device(engine.device)
    group = connect(own, place, engine.tensor_parallel_size, device, address, engine.batch_invariant)
    group.pipe = connect_stages(across, stages - 1 - behind, stages, device, address)
    group.capturable = group.capturable and group.pipe.capturable
    if group.size > 1 and group.capturable and backend_of(config) == "triton":
        from flover.engine.peers import open_exchange  # triton is not everywhere

        group.exchange = open_exchange(own, place, group.size, device)
    return group


def form_group(config: ResolvedConfig, folder: Path, make_local: Callable[[Group], LocalExecutor]) -> GroupExecutor:
    """Start the other ranks, or wait for those that torchrun has started, and load on all of them.

    Args:
        make_local: this rank's executor, with its runner.

    Raises:
        ValueError: a rank that does not come, differs or cannot load; which, and why.
    """
    size, launch = config.engine.num_ranks, launched()
    try:
        if launch is None:
            store: Any = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            ranks, address = start_ranks(size), "127.0.0.1"
        else:
            store, address = open_store(launch), launch.address()
            ranks = await_ranks(size, address, lambda where: store.set(where_key(), where))
    except GroupDeadError as error:
        raise ValueError(str(error)) from None
    try:
        return _load(config, folder, ranks, store, address, None if launch else ("127.0.0.1", store.port), make_local)
    except GroupDeadError as error:
        ranks.close()
        raise ValueError(str(error)) from None
    except BaseException:
        ranks.close()
        raise


def _load(
    config: ResolvedConfig,
    folder: Path,
    ranks: Ranks,
    store: Any,
    address: str,
    where: tuple[str, int] | None,
    make_local: Callable[[Group], LocalExecutor],
) -> GroupExecutor:
    for rank, hello in ranks.expect(Hello, JOIN_SECONDS):
        if hello.version != flover.__version__:
            raise ValueError(f"rank {rank} runs flover {hello.version}, rank 0 runs {flover.__version__}")
    prefix = secrets.token_hex(8)  # a store may have seen other groups
    ranks.broadcast(Assignment(config, prefix, where))
    check_alike(describe(config, folder), ranks.expect(Described))
    ranks.broadcast(Go())
    group = _in_background(lambda: meet(store, prefix, 0, config, address), ranks)
    local = _in_background(lambda: make_local(group), ranks)
    ranks.expect(Loaded)
    return GroupExecutor(ranks, local, config.scheduler.max_num_seqs, group.close)


def _in_background(function: Callable[[], T], ranks: Ranks) -> T:
    """Its result; GroupDeadError if meanwhile a rank is lost, for which it may wait for ever."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="flover-start").start()
    while True:
        try:
            return future.result(timeout=TICK)
        except FutureTimeout:
            ranks.check()
        except RuntimeError:  # of a collective, because a rank is gone?
            ranks.wait_for_failure(1.0)
            ranks.check()
            raise
