"""Ranks on GPUs against one: the kernels' sharded shapes with two ranks on one GPU (gloo), and two GPUs (NCCL).

Stages of a pipeline likewise: on one GPU kernel by kernel, on GPUs of their own as graphs.
"""

from __future__ import annotations

import os
import random
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
from test_gpu_engine import FAMILIES, check_bits_alone_and_fused, compare, params, random_prompts, run

from flover import LLM
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.engine.gpu_runner import GpuRunner
from flover.request import FinishReason, Request, RowSampling

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ranks import ThreadRanks

STAGES: dict[str, Any] = {"device": "cuda", "pipeline_parallel_size": 2, "gpu_memory_utilization": 0.2}
STAGED = ("llama-tied-biases", "gemma3", "opt-350m", "gpt2", "gptj", "bloom-3-heads")
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


@pytest.mark.parametrize("name", STAGED)
def test_stages_on_a_shared_gpu(
    name: str, tmp_path: Path, shared: ThreadRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are not cut, and that are, into micro-batches of a few tokens."""
    hf = build(CASES[name], tmp_path)
    prompts = random_prompts(hf.config.vocab_size)
    settings = {"max_num_batched_tokens": 24, "max_model_len": 64}
    whole = run(str(tmp_path), prompts, device="cuda", **settings)
    compare(whole, run(str(tmp_path), prompts, **STAGES, **settings), 4)
    monkeypatch.setattr("flover.engine.gpu_runner.MICRO_BATCH", 4)
    compare(whole, run(str(tmp_path), prompts, **STAGES, **settings), 4)
    assert isinstance(shared.runners[1], GpuRunner)


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_layouts_in_stages_on_a_shared_gpu(
    options: dict[str, Any], shared: ThreadRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flover.engine.gpu_runner.MICRO_BATCH", 4)
    prompts = random_prompts(500)
    whole = run("kjv-llama", prompts, device="cuda")
    compare(whole, run("kjv-llama", prompts, **(STAGES | {"pipeline_parallel_size": 3} | options)), 2)


def test_two_stages_of_two_ranks_on_a_shared_gpu(shared: ThreadRanks) -> None:
    prompts = random_prompts(500)
    whole = run("kjv-llama", prompts, device="cuda")
    compare(whole, run("kjv-llama", prompts, tensor_parallel_size=2, **STAGES), 2)


def test_the_last_stage_scores_prompts(shared: ThreadRanks) -> None:
    scores = []
    for options in ({"device": "cuda"}, STAGES):
        with LLM("kjv-llama", dtype="float32", **options) as llm:
            asked = params(0, prompt_logprobs=2)
            scores.append(llm.generate("In the beginning God created", asked)[0].prompt_logprobs[1:])
    for x, y in zip(*scores, strict=True):
        assert x.keys() == y.keys()
        assert all(abs(x[t].logprob - y[t].logprob) < 1e-3 for t in x)


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
        check_bits_alone_and_fused(llm, prompts, [params(i) for i in range(len(prompts))])


def as_graphs(prompts: list[list[int]], **options: Any) -> list[Any]:
    """Tokens without log-probabilities, so that sampling has graphs too; every rank has recorded some."""
    with LLM("kjv-llama", dtype="float32", max_num_seqs=8, **options) as llm:
        runner: Any = llm.engine.core._executor._runner  # type: ignore[attr-defined]
        assert runner.group.capturable
        assert runner._lane.graphs._forward
        each = [params(i, logprobs=None) for i in range(len(prompts))]
        return [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], each)]


@two_gpus
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_stages_on_two_gpus(options: dict[str, Any]) -> None:
    prompts = random_prompts(500)
    want = run("kjv-llama", prompts, device="cpu")
    compare(want, run("kjv-llama", prompts, **(STAGES | options)), 2)
    plain = as_graphs(prompts, **(STAGES | options))
    assert sum(a.token_ids == b.token_ids for i, (a, b) in enumerate(zip(want, plain)) if i % 3 != 2) >= 5  # of 6


@two_gpus
def test_micro_batches_on_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 1,500 tokens in one step: the first stage sends a part and goes on."""
    cut, in_parts = [], GpuRunner._in_parts
    monkeypatch.setattr(GpuRunner, "_in_parts", lambda self, *args: cut.append(args) or in_parts(self, *args))
    rng = random.Random(0)
    prompts = [[rng.randrange(2500) for _ in range(n)] for n in (300, 100, 500, 200, 400)]
    whole = run("kjv-llama", prompts, device="cuda")
    assert not cut
    compare(whole, run("kjv-llama", prompts, **STAGES), 2)
    assert cut


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_two_stages_of_two_gpus() -> None:
    prompts = random_prompts(500)
    want = run("kjv-llama", prompts, device="cpu")
    options = STAGES | {"tensor_parallel_size": 2}
    compare(want, run("kjv-llama", prompts, **options), 2)
    plain = as_graphs(prompts, **options)
    assert sum(a.token_ids == b.token_ids for i, (a, b) in enumerate(zip(want, plain)) if i % 3 != 2) >= 5  # of 6


@two_gpus
@pytest.mark.parametrize("ranks", [TWO, STAGES], ids=["tensor", "stages"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_every_request(signum: int, ranks: dict[str, Any]) -> None:
    """Also a device that waits for the lost one's signal goes on."""
    core = EngineCore(EngineConfig(max_model_len=512, max_num_seqs=8, **ranks))
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
    again = EngineCore(EngineConfig(max_model_len=512, max_num_seqs=8, **ranks))  # the device is usable
    again.add(Request("again", [1, 2, 3], RowSampling(seed=0), 5))
    while again.has_unfinished():
        again.step()
    again.shutdown()
