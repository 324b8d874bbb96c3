"""Stages: the tokens of the whole model, whatever the family, alone and with tensor parallelism inside of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import CASES, checkpoints
from ranks import ThreadRanks, together
from torch.distributed import HashStore

from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.engine.runner import Batch, micro_batches
from flover.parallel import CPU, Group, connect_stages
from flover.request import Request, RowSampling
from flover.sharding import stage_layers

QUICK = ("llama-tied-biases", "gemma3", "opt-350m", "gpt2")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = checkpoints(CASES, tmp_path_factory)
    return lambda name: made(name).folder


def requests(limit: int) -> list[Request]:
    """Several lengths up to a limit, greedy, random and with filters and a penalty; one scores its prompt."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
    ]
    made = []
    for i, length in enumerate((3, 17, 5, 9, 1)):
        sampling = RowSampling(seed=i, **kinds[i % 3])
        prompt = [(7 * i + 3 * j) % 90 for j in range(min(length, limit))]
        logprobs: Any = [] if sampling.logprobs >= 0 else None
        made.append(Request(str(i), prompt, sampling, 6, prompt_logprobs=1 if i == 1 else -1, logprobs=logprobs))
    return made


def served(model: Path | str, **options: Any) -> tuple[list[list[int]], Any]:
    settings: dict[str, Any] = {"dtype": "float64", "device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 12}
    core = EngineCore(EngineConfig(model=str(model), **settings | options))
    made = requests(core.resolved.scheduler.max_model_len - 6)
    for request in made:
        core.add(request)
    while core.has_unfinished():
        core.step()
    core.shutdown()
    assert not [request.error for request in made if request.error]
    scores = [*(made[1].prompt_logprob_list or [])[1:], *(made[2].logprobs or [])]
    return [request.output_token_ids for request in made], scores


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_whole_model(name: str, folders: Any, ranks: ThreadRanks) -> None:
    length = 10 if "dynamic" in name else 40  # which has no more
    tokens, scores = served(folders(name), max_model_len=length)
    settings = [(2, 1, {}), (3, 1, {"overlap_depth": 0, "kv_layout": "slab"})]
    heads = CASES[name].settings.get("n_head", 4)
    if heads % 2 == 0:
        settings.append((2, 2, {"kv_layout": "slab", "reorder": "indirect"}))
    for stages, width, options in settings:
        found = served(
            folders(name), pipeline_parallel_size=stages, tensor_parallel_size=width, max_model_len=length, **options
        )
        assert found[0] == tokens, (stages, width)
        for a, b in zip(found[1], scores):
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-6 for token in b)


def test_dummy_weights_are_those_of_the_whole(folders: Any, ranks: ThreadRanks) -> None:
    tokens, _ = served(folders("gpt2"), load_format="dummy")
    assert served(folders("gpt2"), load_format="dummy", pipeline_parallel_size=3)[0] == tokens


def test_a_rank_holds_only_its_stage(folders: Any, ranks: ThreadRanks) -> None:
    model = folders("llama-gqa")
    core = EngineCore(EngineConfig(model=str(model), device="cpu", dtype="float64", pipeline_parallel_size=3))
    runners = [core._executor._runner, ranks.runners[1], ranks.runners[2]]  # type: ignore[attr-defined]
    names = [{name.split(".")[1] for name, _ in r.model.named_parameters() if "layers." in name} for r in runners]
    assert sorted(names, key=min) == [{"0"}, {"1"}, {"2"}]
    assert names[0] == {"2"}, "rank 0 is of the last stage"
    assert [len(runner.storage.k) for runner in runners] == [1, 1, 1]
    heads = [any(name.startswith("lm_head") for name, _ in r.model.named_parameters()) for r in runners]
    embeddings = [any(name.startswith("embed.") for name, _ in r.model.named_parameters()) for r in runners]
    assert (heads, embeddings) == ([True, False, False], [False, False, True])
    core.shutdown()


def test_what_stages_say_to_each_other() -> None:
    """Parts in order, though the first stage sends all before anybody receives; and the last stage is right."""
    store: Any = HashStore()  # type: ignore[no-untyped-call]
    parts = torch.arange(12.0).view(3, 4)

    def stage(number: int) -> tuple[list[list[float]], bool, list[int]]:
        pipe = connect_stages(store, number, 3, CPU, "127.0.0.1")
        received = []
        for part in parts:
            x = part if pipe.first else pipe.receive(torch.empty(4))
            received.append(x.tolist())
            if not pipe.last:
                pipe.send(x + 100)
        pipe.flush()
        agreed = Group(pipe=pipe).agree(pipe.last, CPU)
        return received, agreed, pipe.share(torch.tensor([number])).tolist()

    for number, (received, agreed, shared) in enumerate(together(3, stage)):
        assert received == (parts + 100 * number).tolist()
        assert agreed
        assert shared == [2]


def test_micro_batches_are_even_and_whole() -> None:
    counts = np.array([1, 9, 1, 1, 1, 1, 5, 1])
    rows, flags = np.arange(8), np.zeros(8, dtype=np.bool_)
    batch = Batch(rows, counts, rows, flags, ~flags, flags, np.arange(20, dtype=np.int32))
    parts = micro_batches(batch, 2)
    assert [part.counts.sum() for part in parts] == [10, 10]
    assert np.concatenate([part.rows for part in parts]).tolist() == rows.tolist()
    assert np.concatenate([part.prefill_ids for part in parts]).tolist() == list(range(20))
    assert len(micro_batches(batch.part(rows < 1), 4)) == 1


def test_layers_of_stages() -> None:
    assert [stage_layers(7, stage, 3) for stage in range(3)] == [(0, 3), (3, 5), (5, 7)]


def test_what_cannot_be_divided(folders: Any) -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size=4 is more than the model's 3 layers"):
        served(folders("gpt2"), pipeline_parallel_size=4)
