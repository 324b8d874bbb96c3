"""Ranks on GPUs against one: the kernels' sharded shapes with two ranks on one GPU (gloo), and two GPUs (NCCL)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, build
from test_gpu_engine import FAMILIES, compare, params, random_prompts, run

from flover import LLM
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.engine.gpu_runner import GpuRunner
from flover.request import FinishReason, Request, RowSampling

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ranks import ThreadRanks

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
TWO: dict[str, Any] = {"device": "cuda", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.2}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 0},
    {"num_kv_blocks": 24, "block_size": 4, "max_model_len": 64},  # preempts
    {"kv_layout": "slab", "reorder": "move", "max_model_len": 64},
    {"kv_layout": "slab", "reorder": "indirect", "max_model_len": 64},
]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadRanks]:
    """Ranks are threads that share the first GPU."""
    threads = ThreadRanks()
    monkeypatch.setattr("flover.engine.join.start_ranks", threads.start)
    monkeypatch.setattr("flover.engine.engine._share", lambda hardware, ranks: hardware)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield threads
    threads.join()


def even_heads(name: str) -> bool:
    return not any(odd in name for odd in ("3-heads", "mqa"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if even_heads(name)])
def test_every_family_on_a_shared_gpu(name: str, tmp_path: Path, shared: ThreadRanks) -> None:
    hf = build(CASES[name], tmp_path)
    length = hf.config.max_position_embeddings if "dynamic" in name else 64
    prompts = [p[: max(length - 30, 1)] for p in random_prompts(hf.config.vocab_size)]
    settings = {"max_num_batched_tokens": 24, "max_model_len": length}
    whole = run(str(tmp_path), prompts, device="cuda", **settings)
    compare(whole, run(str(tmp_path), prompts, **TWO, **settings), 4)
    assert isinstance(shared.runners[1], GpuRunner)


@two_gpus
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["kjv-llama", "kjv-gpt2"])
def test_two_gpus(model: str, options: dict[str, Any]) -> None:
    prompts = random_prompts(500)
    want = run(model, prompts, device="cpu")
    compare(want, run(model, prompts, **(TWO | options)), 2)
    plain = run(model, prompts, {"logprobs": None}, **(TWO | options))  # as graphs
    same = sum(a.token_ids == b.token_ids for i, (a, b) in enumerate(zip(want, plain)) if i % 3 != 2)
    assert same >= 5  # of 6 without penalties


@two_gpus
def test_small_sums_go_through_shared_memory() -> None:
    with LLM("kjv-llama", **TWO) as llm:
        exchange = llm.engine.core._executor._runner.group.exchange  # type: ignore[attr-defined]
        assert exchange is not None
        before = exchange.rounds.clone()
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], params(0))
        assert (exchange.rounds > before).all()


@two_gpus
def test_two_gpus_batch_invariant() -> None:
    """Statement (b) at two ranks: bits do not depend on company, whichever way a sum takes."""
    prompts = random_prompts(500)
    with LLM("kjv-llama", batch_invariant=True, max_num_seqs=8, max_num_batched_tokens=24, **TWO) as llm:
        inputs = [{"prompt_token_ids": p} for p in prompts]
        each = [params(i) for i in range(len(prompts))]
        fused = [o.outputs[0] for o in llm.generate(inputs, each)]
        for one, p, together in zip(inputs, each, fused):
            alone = llm.generate(one, p)[0].outputs[0]
            assert alone.token_ids == together.token_ids
            assert alone.cumulative_logprob == together.cumulative_logprob


@two_gpus
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_every_request(signum: int) -> None:
    """Also a device that waits for the lost one's signal goes on."""
    core = EngineCore(EngineConfig(max_model_len=512, max_num_seqs=8, **TWO))
    requests = [Request(f"r{i}", [1 + i, 2, 3], RowSampling(seed=i), 500) for i in range(200)]  # some seconds' work
    for request in requests:
        core.add(request)
    victim, moment = core._executor._ranks._links[-1].process.pid, [0.0]  # type: ignore[attr-defined]

    def strike() -> None:
        time.sleep(0.3)
        moment[0] = time.monotonic()
        os.kill(victim, signum)

    threading.Thread(target=strike).start()
    finished = []
    while core.has_unfinished():
        finished += core.step().finished
    assert moment[0], "all was over before"
    assert time.monotonic() - moment[0] < 5
    assert len(finished) == len(requests)
    lost = [request for request in finished if request.finish_reason is FinishReason.ERROR]
    assert len(lost) >= 8
    assert "rank 1" in (lost[0].error or "")
    core.shutdown()
    again = EngineCore(EngineConfig(max_model_len=512, max_num_seqs=8, **TWO))  # the device is usable
    again.add(Request("again", [1, 2, 3], RowSampling(seed=0), 5))
    while again.has_unfinished():
        again.step()
    again.shutdown()
