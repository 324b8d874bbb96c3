"""A rank that dies or stops, in real processes: every request ends with an error in time; nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flover import AsyncLLM, SamplingParams
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.engine.links import GroupDeadError
from flover.engine.remote import EngineDeadError
from flover.request import FinishReason, Request, RowSampling

LIMIT = 5.0  # seconds from the fault to the last error
SHARED = Path("/dev/shm")


def core_of(size: int, **options: Any) -> EngineCore:
    settings: dict[str, Any] = {"device": "cpu", "max_model_len": 512, "tensor_parallel_size": size, **options}
    return EngineCore(EngineConfig(**settings))


def long_requests(count: int) -> list[Request]:
    return [Request(f"r{i}", [1 + i, 2, 3], RowSampling(seed=i), 500) for i in range(count)]


def left_behind(before: set[str]) -> list[str]:
    """What a group should not leave: processes, ports, shared memory."""
    me = psutil.Process()
    kinds = [f"process {child.pid}" for child in me.children(recursive=True)]
    kinds += [f"port {c.laddr.port}" for c in me.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    return kinds + [f"shared memory {name}" for name in set(os.listdir(SHARED)) - before]


@pytest.mark.parametrize(
    ("signum", "size"),
    [(signal.SIGKILL, 2), (signal.SIGSTOP, 2), pytest.param(signal.SIGKILL, 4, marks=pytest.mark.slow)],
)
def test_a_lost_rank_ends_every_request(signum: int, size: int) -> None:
    shared = set(os.listdir(SHARED))
    core = core_of(size)
    requests = long_requests(6)
    for request in requests:
        core.add(request)
    links = core._executor._ranks._links  # type: ignore[attr-defined]
    victim, moment = links[-1].process.pid, [0.0]

    def strike() -> None:
        time.sleep(0.3)
        moment[0] = time.monotonic()
        os.kill(victim, signum)

    threading.Thread(target=strike).start()
    finished = []
    while core.has_unfinished():
        finished += core.step().finished
    assert moment[0], "all was over before"
    assert time.monotonic() - moment[0] < LIMIT
    assert {request.request_id for request in finished} == {request.request_id for request in requests}
    assert all(request.finish_reason is FinishReason.ERROR for request in finished)
    expected = "was killed by SIGKILL" if signum == signal.SIGKILL else "has not been heard of"
    assert f"rank {size - 1} (process {victim}) {expected}" in (requests[0].error or "")
    with pytest.raises(GroupDeadError, match="rank"):
        core.add(Request("late", [1], RowSampling(seed=0), 1))
    core.shutdown()
    del core
    assert not left_behind(shared)


def test_a_new_group_starts_after_a_fault() -> None:
    for _ in range(2):
        core = core_of(2)
        request = Request("r", [1, 2, 3], RowSampling(seed=0), 5)
        core.add(request)
        while core.has_unfinished():
            core.step()
        assert request.num_output_tokens == 5
        core._executor._ranks._links[0].process.kill()  # type: ignore[attr-defined]
        core.shutdown()


@pytest.mark.slow
def test_a_server_says_so_and_ends(tmp_path: Path) -> None:
    async def serve() -> list[str | None]:
        llm = AsyncLLM(device="cpu", max_model_len=512, tensor_parallel_size=2)
        engine = psutil.Process(llm._core._process.pid)  # type: ignore[attr-defined]
        params = SamplingParams(max_tokens=500, ignore_eos=True)

        async def one(number: int) -> str | None:
            try:
                async for _ in llm.generate([1, 2, number], params):
                    pass
            except EngineDeadError as error:  # to a server this is 503 engine_dead
                return str(error)
            return None

        tasks = [asyncio.create_task(one(number)) for number in range(4)]
        await asyncio.sleep(1.0)
        [rank] = engine.children()
        rank.kill()
        started = time.monotonic()
        errors = await asyncio.gather(*tasks)
        assert time.monotonic() - started < LIMIT
        engine.wait(LIMIT)
        llm.shutdown()
        return errors

    assert all("was killed by SIGKILL" in (error or "") for error in asyncio.run(serve()))


@pytest.mark.slow
def test_an_idle_engine_ends_with_a_rank() -> None:
    """So that whoever keeps it running starts another before a request meets it."""
    llm = AsyncLLM(device="cpu", max_model_len=512, tensor_parallel_size=2)
    engine = psutil.Process(llm._core._process.pid)  # type: ignore[attr-defined]
    [rank] = engine.children()
    rank.kill()
    psutil.wait_procs([engine], timeout=LIMIT)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    llm.shutdown()


def test_ranks_end_with_rank_0() -> None:
    """Killed without a chance to say so; a rank that is stopped goes too."""
    code = (
        "import flover, time; llm = flover.LLM(device='cpu', tensor_parallel_size=2);"
        "print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 1
        ranks[0].suspend()
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=LIMIT)
        assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]


def test_errors_at_start_are_one_line() -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "flover", "generate", "x", "--device", "cpu", "-tp", "2"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment |= {"MASTER_PORT": str(server.getsockname()[1]), "LOCAL_WORLD_SIZE": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the port is in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
