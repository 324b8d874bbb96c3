"""The engine on several ranks: the tokens of one rank, on every rank; and a rank that disagrees is found."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import echo_core, echo_folder, prefix_equal, random_jobs, run
from ranks import ThreadRanks
from test_same_tokens import FUSED, drive, make_requests, start, trace

from flover import LLM, SamplingParams
from flover.config import EngineConfig
from flover.engine.batch import BatchPlan, RowJoin
from flover.engine.digest import RowDigest
from flover.engine.engine import EngineCore
from flover.engine.launch import COMMAND, launched
from flover.engine.links import GroupDeadError
from flover.request import FinishReason, Request, RowSampling
from flover.structured import StructuredOutputsParams

LAYOUTS: list[dict[str, Any]] = [
    {"kv_layout": "paged", "block_size": 8, "num_kv_blocks": 14},  # preempts often
    {"kv_layout": "slab", "reorder": "move"},
    {"kv_layout": "slab", "reorder": "indirect"},
    {"kv_layout": "slab", "reorder": "off"},
]
SERIAL: dict[str, Any] = {"policy": "serial", "overlap_depth": 0, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 heads, 6 of them for K and V: divisible by 1, 2 and 3; by 4 with 4 of them, which the other folder has."""
    return echo_folder(tmp_path_factory.mktemp("echo"), hidden_size=48, num_attention_heads=12, num_key_value_heads=6)


@pytest.fixture(scope="module")
def echo_shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads that share 2 for K and V: of 4 ranks, two hold each."""
    folder = tmp_path_factory.mktemp("shared")
    return echo_folder(folder, hidden_size=16, num_attention_heads=4, num_key_value_heads=2)


def watch_draws(runner: Any, into: list[list[int]]) -> None:
    sample = runner.sampler.sample

    def watched(logits: Any, rows: Any) -> Any:
        output = sample(logits, rows)
        into.append(output.token_ids.tolist())
        return output

    runner.sampler.sample = watched


def check_traces(folder: Path, size: int, seeds: list[int], threads: ThreadRanks) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        jobs = random_jobs(rng, 8)
        serial = echo_core(folder, **SERIAL)
        expected = run(serial, jobs)
        serial.shutdown()
        options = rng.choice(LAYOUTS) | {"overlap_depth": rng.randint(0, 1)}
        options |= {"prefill_mode": rng.choice(["mixed", "separate"]), "max_num_batched_tokens": rng.choice([7, 64])}
        core = echo_core(folder, tensor_parallel_size=size, **options)
        drawn: dict[int, list[list[int]]] = defaultdict(list)
        watch_draws(core._executor._local._runner, drawn[0])  # type: ignore[attr-defined]
        for number, runner in threads.runners.items():
            watch_draws(runner, drawn[number])
        actual = run(core, jobs)
        core.shutdown()
        threads.join()
        prefix_equal(expected, actual, jobs)
        assert len(drawn) == size
        assert all(drawn[number] == drawn[0] for number in range(size)), "ranks drew different tokens"


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_are_those_of_one_rank(size: int, echo: Path, ranks: ThreadRanks) -> None:
    check_traces(echo, size, [1, 2, 3, 4], ranks)


def test_tokens_are_those_of_one_rank_with_shared_kv_heads(echo_shared: Path, ranks: ThreadRanks) -> None:
    check_traces(echo_shared, 4, [5, 6, 7, 8], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_are_those_of_one_rank_in_many_traces(
    size: int, echo: Path, echo_shared: Path, ranks: ThreadRanks
) -> None:
    check_traces(echo_shared if size == 4 else echo, size, list(range(100, 140)), ranks)


def test_float64_tokens_and_ordered_sums(ranks: ThreadRanks) -> None:
    """Real arithmetic, every kind of sampling; fp64 logits and tokens are those of one rank."""
    serial = trace("kjv-llama", make_requests(3), policy="serial", overlap_depth=0, dtype="float64")
    for options in FUSED[1:4]:
        tokens = group_tokens("kjv-llama", make_requests(3), dtype="float64", tensor_parallel_size=2, **options)
        assert tokens == serial.tokens, options


def group_tokens(model: str, requests: list[Request], **options: Any) -> dict[str, list[int]]:
    core = start(model, **options)
    tokens = {request.request_id: request.output_token_ids for request in drive(core, requests)}
    core.shutdown()
    return tokens


def test_logprobs_are_those_of_one_rank(ranks: ThreadRanks) -> None:
    def run_one(size: int) -> tuple[Any, Any]:
        settings: dict[str, Any] = {"dtype": "float64", "device": "cpu", "max_model_len": 64}
        core = EngineCore(EngineConfig(tensor_parallel_size=size, **settings))
        request = Request(
            "r", [3, 1, 4, 1, 5], RowSampling(seed=1, logprobs=3, temperature=0.7, top_p=0.9), 6,
            prompt_logprobs=2, logprobs=[],
        )  # fmt: skip
        core.add(request)
        while core.has_unfinished():
            core.step()
        core.shutdown()
        return request.logprobs, request.prompt_logprob_list

    (one, prompt_one), (two, prompt_two) = run_one(1), run_one(2)
    for a, b in zip([*one, *prompt_one[1:]], [*two, *prompt_two[1:]]):
        assert a.keys() == b.keys()
        assert all(abs(a[token].logprob - b[token].logprob) < 1e-6 for token in a)


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def endless(core: EngineCore, count: int = 2) -> list[Request]:
    requests = [Request(f"r{i}", [1 + i, 2, 3], RowSampling(seed=i), 60) for i in range(count)]
    for request in requests:
        core.add(request)
    for _ in range(6):
        core.step()
    return requests


@pytest.mark.parametrize("depth", [0, 1])
def test_a_rank_that_disagrees_stops_the_group(depth: int, echo: Path, ranks: ThreadRanks) -> None:
    core = echo_core(echo, tensor_parallel_size=2, overlap_depth=depth)
    requests = endless(core)
    ranks.runners[1].seq_lens[1] += 1
    finished = []
    for _ in range(200):
        finished += core.step().finished
        if core.dead:
            break
    assert {request.request_id for request in finished} == {"r0", "r1"}
    assert all(request.finish_reason is FinishReason.ERROR for request in requests)
    theirs = int(ranks.runners[1].seq_lens[1])
    for error in (requests[0].error, str(core.dead)):
        assert f"row 1 has {theirs} tokens on rank 1, {theirs - 1} on rank 0" in error
    assert not core.has_unfinished()
    with pytest.raises(GroupDeadError, match="rank 1"):
        core.add(Request("late", [1], RowSampling(seed=0), 1))
    core.shutdown()


def test_a_plan_that_does_not_arrive_is_noticed(echo: Path, ranks: ThreadRanks) -> None:
    core = echo_core(echo, tensor_parallel_size=2, overlap_depth=0)
    endless(core)
    core._executor._sequence += 1  # type: ignore[attr-defined]
    while not core.dead:
        core.step()
    assert "rank 0 is at step" in str(core.dead)
    core.shutdown()


def test_the_digest_sees_requests_lengths_and_blocks() -> None:
    def digest(request: int = 0, cached: int = 0, block: int = 5, count: int = 3, row: int = 0) -> int:
        join = RowJoin(row, 3, 3, cached, RowSampling(seed=0), None, request)
        scheduled = np.zeros(2, dtype=np.int32)
        scheduled[row] = count
        return RowDigest(4).advance(BatchPlan(0, 2, scheduled.tobytes(), joins=[join], tables=[(row, 0, [block])]))

    values = [digest(), digest(request=1), digest(cached=1), digest(block=6), digest(count=2), digest(row=1)]
    assert len(set(values)) == len(values)
    assert digest() == digest()


# ---- a start that cannot work ----------------------------------------------------------------------------------------


def test_ranks_that_differ_are_refused(echo: Path, ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.engine import rank
    from flover.engine.join import describe

    for what in ("weights", "settings", "version of torch", "config.json"):

        def other(config: Any, folder: Path, what: str = what) -> Any:
            described = describe(config, folder)
            described.facts[what] = "0123"
            return described

        monkeypatch.setattr(rank, "describe", other)
        options: dict[str, Any] = {} if what == "weights" else {"load_format": "dummy"}
        with pytest.raises(ValueError, match=f"rank 1 has another {what}: 0123, rank 0 has"):
            EngineCore(EngineConfig(tensor_parallel_size=2, device="cpu", max_model_len=64, **options))


def test_weights_that_differ_have_another_fingerprint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from flover.engine.join import _fingerprint

    weights = {"a": torch.randn(50, 40), "b": torch.randn(7)}
    save_file(weights, tmp_path / "model.safetensors")
    before = _fingerprint(tmp_path)
    assert before == _fingerprint(tmp_path)
    weights["a"][25, 0] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert before != _fingerprint(tmp_path)


def test_a_rank_that_cannot_load_is_named(echo: Path, ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory for the weights")

    monkeypatch.setattr("flover.engine.rank.make_runner", fail)
    with pytest.raises(ValueError, match="rank 1 failed: MemoryError: no memory for the weights"):
        echo_core(echo, tensor_parallel_size=2)


def test_a_rank_that_does_not_join_is_named(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flover.engine.join.JOIN_SECONDS", 0.5)
    monkeypatch.setattr("flover.engine.rank.Rank.run", lambda self: time.sleep(1.5))
    threads = ThreadRanks()
    monkeypatch.setattr("flover.engine.join.start_ranks", threads.start)
    with pytest.raises(ValueError, match="rank 1 has not joined within 0 s"):
        echo_core(echo, tensor_parallel_size=2)


def test_what_the_environment_says() -> None:
    assert launched({}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    launch = launched({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size, launch.port) == (1, 2, 0, 1, 29500)
    with pytest.raises(ValueError, match="MASTER_PORT is 'x', not a number"):
        launched({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "x"})
    with pytest.raises(ValueError, match="RANK=2, which is not below WORLD_SIZE=2"):
        launched({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})


def test_ranks_started_and_ranks_wanted_must_be_as_many(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the settings are for 2 ranks, but 3 were started"):
        echo_core(echo, tensor_parallel_size=2)
    echo_core(echo).shutdown()  # in a program of one's own each process may have an engine
    monkeypatch.setenv(COMMAND, "serve")  # but here the others wait to serve this one
    with pytest.raises(ValueError, match="the settings are for 1 rank, but 3 were started"):
        echo_core(echo)


def test_heads_that_do_not_divide(echo: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=5 does not divide the model's 12 heads"):
        echo_core(echo, tensor_parallel_size=5)


def test_a_grammar_binds_every_rank(ranks: ThreadRanks) -> None:
    """Its masks reach the ranks with the sampling phase, beside a request without one."""

    def run_one(size: int) -> list[str]:
        with LLM(device="cpu", dtype="float64", max_model_len=96, tensor_parallel_size=size) as llm:
            bound = SamplingParams(
                structured_outputs=StructuredOutputsParams(regex="(ab|cd)+e"), max_tokens=12, temperature=0.9, seed=1
            )
            free = SamplingParams(max_tokens=12, temperature=0.9, seed=1)
            outputs = llm.generate(["In the", "And Moses"], [bound, free], use_tqdm=False)
            return [output.outputs[0].text for output in outputs]

    one, two = run_one(1), run_one(2)
    assert one == two
    assert one[0].startswith(("ab", "cd"))
